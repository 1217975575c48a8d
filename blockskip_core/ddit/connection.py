"""The residual connection: what coarse tokens cannot carry is estimated from the latent itself, without the model.

DDiT (arXiv 2602.16968) leads the latent around the model, through a small residual block. Here the connection begins with
the best linear estimate of the clean latent from the noisy one, patch by patch, from mean and covariance of clean patches:
with ``patch = (1 - sigma) clean + sigma noise``, in the covariance's eigenvectors

    clean = mean + gain (patch - (1 - sigma) mean),    gain = (1 - sigma) v / ((1 - sigma)^2 v + sigma^2)

for an eigenvalue v (Wiener's filter). Of that, only the part is used that the coarse tokens lack
(``PatchResizing.carried``); the trained residual block adds to it (``patch_adapter``).

Difference from the paper: its residual block has to learn this part too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .patch_resizing import PatchResizing

_SHRINKAGE = 0.02  # towards the mean variance, because a few pictures give a covariance that is too confident
_SMALLEST_VARIANCE = 1e-4


@dataclass(frozen=True)
class PatchStatistics:
    """Mean and covariance of clean patches.

    Attributes:
        mean: (n,).
        directions: Eigenvectors of the covariance as columns, (n, n).
        variances: Its eigenvalues, (n,).
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor

    @staticmethod
    @torch.no_grad()
    def of(latents: Tensor, resizing: PatchResizing) -> PatchStatistics:
        """Measure them on clean latents, (B, C, H, W); float32, computed in float64, one latent at a time: clips are large."""
        number = len(latents) * len(_patches(latents[0], resizing))
        mean = torch.stack([_patches(latent, resizing).sum(0) for latent in latents]).sum(0) / number
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for latent in latents:
            away = _patches(latent, resizing) - mean
            covariance += away.T @ away / number
        spread = covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        variances, directions = torch.linalg.eigh((1.0 - _SHRINKAGE) * covariance + _SHRINKAGE * spread)
        found = mean, directions, variances.clamp_min(_SMALLEST_VARIANCE)
        return PatchStatistics(*(tensor.float() for tensor in found))

    def clean(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """Return the estimate of clean patches.

        Args:
            patches: Noisy patches, (B, N, n).
            sigma: Noise levels, (B,).
        """
        level = sigma[:, None, None]
        mean, directions, variances = (x.to(patches) for x in (self.mean, self.directions, self.variances))
        gain = (1.0 - level) * variances / ((1.0 - level) ** 2 * variances + level**2)
        return mean + ((patches - (1.0 - level) * mean) @ directions * gain) @ directions.T


def _patches(latent: Tensor, resizing: PatchResizing) -> Tensor:
    """Return the patches of a latent (C, H, W), (N, n), in float64."""
    return resizing.tokens(latent[None].double())[0]


def around_the_model(latent: Tensor, sigma: Tensor, statistics: PatchStatistics, resizing: PatchResizing) -> Tensor:
    """Return the part of the clean estimate that the coarse tokens lack, (B, C, H, W)."""
    clean = resizing.latent(statistics.clean(resizing.tokens(latent), sigma), latent.shape[-1])
    return clean - resizing.carried(clean)

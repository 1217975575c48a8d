"""One coarse call of a model: the clean estimate of a full-size latent from a forward on coarse tokens.

    reduced  = B^+ latent                                      patch_resizing
    clean    = B model(r reduced, matched level) + around      coarse_noise, connection
    clean    = clean - sigma added velocity                    patch_adapter, if there is one

The model's forward is that on a latent of H / s times W / s cells. The positions of its tokens, and the change of its
embedded tokens, are the caller's to put in place: a host knows where (``hosts/models/coarse_forward``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import same_device
from .coarse_noise import matched_noise
from .connection import PatchStatistics, around_the_model
from .patch_adapter import PatchAdapter
from .patch_resizing import PatchResizing


@dataclass(frozen=True)
class CoarseAdapter:
    """Everything that a coarse call needs besides the model.

    Attributes:
        resizing: The patch size.
        statistics: Of clean patches; None for a call without training, whose estimate lacks what the tokens lack.
        patches: The trained tensors, or None.
    """

    resizing: PatchResizing
    statistics: PatchStatistics | None = None
    patches: PatchAdapter | None = None

    def on(self, device: torch.device) -> CoarseAdapter:
        """Return an adapter with copies of its tensors on a device, or these if they are there."""
        patches = self.patches
        if patches is not None and not same_device(patches.bias.device, device):
            patches = copy.deepcopy(patches).to(device)
        return replace(self.with_statistics_on(device), patches=patches)

    def with_statistics_on(self, device: torch.device) -> CoarseAdapter:
        """Return an adapter with the statistics on a device and these same trained tensors, wherever they are."""
        if self.statistics is None:
            return self
        return replace(self, statistics=PatchStatistics(*(x.to(device) for x in vars(self.statistics).values())))

    def of_clips(self, frames: int) -> CoarseAdapter:
        """Return the same adapter for latents of so many frames."""
        return replace(self, resizing=self.resizing.of_clips(frames))


# (reduced latent, its noise levels, what is added to embedded tokens or None) -> (clean estimate of the reduced latent,
# tokens as they enter the de-embedding)
ReducedCall = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def coarse_estimate(latent: Tensor, sigma: Tensor, adapter: CoarseAdapter, call: ReducedCall) -> Tensor:
    """Return the clean estimate of a full-size latent, (B, C, H, W), in the latent's dtype.

    Args:
        latent: Noisy, (B, C, H, W); C counts the channels of all frames for which the adapter's patches are set.
        sigma: Noise levels, (B,).
        adapter: The patch size and what was trained for it.
        call: One forward of the model.

    Raises:
        InvalidInputError: If the latent is not cut into whole coarse patches.
    """
    resizing, statistics, trained = adapter.resizing, adapter.statistics, adapter.patches
    resizing.require_fitting(*latent.shape[-2:])
    noisy = latent if latent.dtype == torch.float64 else latent.float()
    level = sigma.to(noisy)
    ratio, matched = matched_noise(level, resizing.noise_share)
    patches = resizing.tokens(noisy)
    added = None if trained is None else trained.embedded(patches, level)
    reduced, leaving = call(resizing.reduced(noisy) * ratio[:, None, None, None], matched, added)
    clean = resizing.enlarged(reduced.to(noisy))
    if statistics is not None:
        clean = clean + around_the_model(noisy, level, statistics, resizing)
    if trained is not None:
        velocity = resizing.latent(trained.velocity(leaving, patches, level), latent.shape[-1])
        clean = clean - level[:, None, None, None] * velocity
    return clean.to(latent.dtype)

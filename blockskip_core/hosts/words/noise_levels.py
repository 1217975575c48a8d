"""Noise levels and the model's own error, for every kind of prediction that the host has.

The host turns a model's output into a clean estimate ``denoised``, a linear function of the output at each noise level:

    denoised(output) = denoised(0) + c(sigma) output

    eps prediction   c = -sigma                          flow matching   c = -sigma
    v prediction     c = -sigma / sqrt(sigma^2 + 1)      clean picture   c = 1

So the error of the output, on which the model was trained, is the error of the clean estimate divided by c. c is read
from the host's own function rather than from the kind's name.
"""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

SMALLEST_SIGMA = 1e-3  # below this, the difference from the clean latent is only rounding error


def sigma_of(sampling: Any, level: float) -> float:
    """Return the sigma of a noise level.

    Args:
        sampling: The model's ``model_sampling``.
        level: Share of the model's training time, 0 clean, 1 noise.

    For flow matching this is the level itself. For models trained on discrete times it is the sigma at that time, in
    between interpolated; for others the host's own scale from its smallest to its largest sigma.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return max(level, SMALLEST_SIGMA)
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and not isinstance(
        sampling, comfy.model_sampling.ModelSamplingDiscreteEDM
    ):
        return float(sampling.sigma(torch.tensor(level * (len(sampling.sigmas) - 1))))
    inside = min(max(1.0 - level, 1e-6), 1.0 - 1e-6)  # at its ends the host's scale leaves the range
    return max(float(sampling.percent_to_sigma(inside)), SMALLEST_SIGMA)


def is_flow(sampling: Any) -> bool:
    """Return whether a model is trained by flow matching."""
    return isinstance(sampling, comfy.model_sampling.CONST)


def output_error(sampling: Any, sigma: Tensor, clean: Tensor, denoised: Tensor) -> Tensor:
    """Return the mean squared error of the model's output, a scalar in float32.

    Args:
        sampling: The model's ``model_sampling``.
        sigma: Shape (1,).
        clean, denoised: The clean latent and the model's estimate of it, shape (1, C, ...).
    """
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    factor = sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)
    return ((clean.float() - denoised.float()) / factor.float()).square().mean()

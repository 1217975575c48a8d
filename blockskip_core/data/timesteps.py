"""Distributions of the noise levels of training examples.

The default follows the model: uniform in the model's time, then through its own shift, as a sampler spreads its steps.
The paper does not specify the distribution (arXiv 2603.20755); the others are offered because other trainers use them.
The densities come from diffusers (``compute_density_for_timestep_sampling``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidInputError

TimestepDistribution = Literal["model", "uniform", "logit-normal", "shifted"]
TIMESTEP_DISTRIBUTIONS: tuple[str, ...] = get_args(TimestepDistribution)
SMALLEST_SIGMA = 1e-3  # a velocity is a difference divided by sigma: below this, it is only rounding error


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return ``shift * sigma / (1 + (shift - 1) * sigma)``, the resolution shift of SD3 (arXiv 2403.03206, Eq. 23)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sigma_sampler(
    distribution: TimestepDistribution, *, model_sigma: Callable[[float], float] = lambda time: time, shift: float = 3.0
) -> Callable[[int, torch.Generator], Tensor]:
    """Return a function ``(count, generator) -> sigmas`` of shape (count,) in [SMALLEST_SIGMA, 1].

    Args:
        distribution: "model" (uniform through the model's own shift), "uniform", "logit-normal" (mean 0, standard
            deviation 1) or "shifted" (uniform through ``shift``).
        model_sigma: The model's map from uniform time in [0, 1] (1 = pure noise) to sigma; by default the identity.
        shift: Used by "shifted" only.

    Raises:
        InvalidInputError: If the name is not known or the shift is not positive.
    """
    if distribution not in TIMESTEP_DISTRIBUTIONS:
        raise InvalidInputError(
            f"The timestep distribution must be one of {', '.join(TIMESTEP_DISTRIBUTIONS)}, got {distribution!r}."
        )
    if not 0.0 < shift < math.inf:
        raise InvalidInputError(f"The timestep shift must be positive, got {shift}.")

    def sample(count: int, generator: torch.Generator) -> Tensor:
        from diffusers.training_utils import compute_density_for_timestep_sampling  # slow to import: only when needed

        scheme = "logit_normal" if distribution == "logit-normal" else "none"
        u = compute_density_for_timestep_sampling(
            scheme, count, logit_mean=0.0, logit_std=1.0, device="cpu", generator=generator
        )
        if distribution == "model":
            u = torch.tensor([model_sigma(value) for value in u.tolist()])
        elif distribution == "shifted":
            u = shift_sigma(u, shift)
        return u.float().clamp(SMALLEST_SIGMA, 1.0)

    return sample

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
MOST_DRAWN_AGAIN = 1000  # times that noise levels outside the wanted range are replaced by others
SMALLEST_SIGMA = 1e-3  # a velocity is a difference divided by sigma: below this, it is only rounding error


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return ``shift * sigma / (1 + (shift - 1) * sigma)``, the resolution shift of SD3 (arXiv 2403.03206, Eq. 23)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def require_noise_range(low: float, high: float) -> None:
    """Raise InvalidInputError unless these are the lowest and the highest of some noise levels."""
    if not 0.0 <= low < high <= 1.0:
        raise InvalidInputError(
            f"noise_from and noise_to must be a range within 0 to 1, got {low:g} to {high:g}. Leave them at 0 and 1 to train "
            "on all noise levels."
        )


def sigma_sampler(
    distribution: TimestepDistribution,
    *,
    model_sigma: Callable[[float], float] = lambda time: time,
    shift: float = 3.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> Callable[[int, torch.Generator], Tensor]:
    """Return a function ``(count, generator) -> sigmas`` of shape (count,) in [SMALLEST_SIGMA, 1].

    Args:
        distribution: "model" (uniform through the model's own shift), "uniform", "logit-normal" (mean 0, standard
            deviation 1) or "shifted" (uniform through ``shift``).
        model_sigma: The model's map from uniform time in [0, 1] (1 = pure noise) to sigma; by default the identity.
        shift: Used by "shifted" only.
        within: Lowest and highest sigma: the distribution is cut off there. For models whose experts share the noise
            levels, such as Wan 2.2.

    Raises:
        InvalidInputError: If the name is not known, the shift is not positive, or the range is empty; by the returned
            function, if the distribution has next to nothing within the range.
    """
    if distribution not in TIMESTEP_DISTRIBUTIONS:
        raise InvalidInputError(
            f"The timestep distribution must be one of {', '.join(TIMESTEP_DISTRIBUTIONS)}, got {distribution!r}."
        )
    if not 0.0 < shift < math.inf:
        raise InvalidInputError(f"The timestep shift must be positive, got {shift}.")

    low, high = within
    require_noise_range(low, high)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        sigmas = draw(count, generator)
        for _ in range(MOST_DRAWN_AGAIN):
            outside = (sigmas < low) | (sigmas > high)
            if not outside.any():
                return sigmas
            sigmas[outside] = draw(int(outside.sum()), generator)
        raise InvalidInputError(
            f"Hardly any noise level of the distribution {distribution!r} is within {low:g} to {high:g}. Widen the range of "
            "noise_from and noise_to, or choose other `timesteps`."
        )

    def draw(count: int, generator: torch.Generator) -> Tensor:
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

"""Noise matching: give an upsampled latent the statistics that the model expects, a covariance of (1-s)^2 I.

A token that is copied four times carries the same noise four times. So correlated noise is added, chosen such that the
sum is independent again, and the time goes back a little.

Source: RALU (arXiv 2507.08422), Eq. 7 and appendix A.1. With e the time at which a stage ends, s the time at which
the next one starts, and a token's four copies in one group:

    x_s = a Up(x_e) + b z,    Cov z = I - c 11^T,    0 < c <= 1/4
    d = (1 - e) / sqrt(c),    s = e / (d + e),    a = 1 / (d + e),    b = d / (d + e) = 1 - s

Difference from the paper: it does not mention tokens that are not upsampled, and the published code adds b times
independent noise to them, which leaves them with (1 + c) times too much variance. Here they get sqrt(1 - c) times that
noise, which makes their covariance exact too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInputError


@dataclass(frozen=True)
class Restart:
    """How one stage hands over to the next.

    Attributes:
        start: Time s at which the next stage starts.
        scale: a, the factor of the latent.
        noise: b, the factor of the added noise.
        correlation: c; minus this is the covariance of the added noise between two copies of a token.
    """

    start: float
    scale: float
    noise: float
    correlation: float


def restart_after(end: float, correlation: float) -> Restart:
    """Return the restart that fits a stage's end.

    Args:
        end: Time e, above 0 and below 1.
        correlation: c, above 0 and at most 1/4.

    Raises:
        InvalidInputError: If one of them is out of its range.
    """
    if not 0.0 < end < 1.0:
        raise InvalidInputError(f"A stage that is not the last must end between 0 and 1, got {end}.")
    if not 0.0 < correlation <= 0.25:
        raise InvalidInputError(
            f"The correlation of the added noise must be above 0 and at most 0.25, got {correlation}."
        )
    distance = (1.0 - end) / math.sqrt(correlation)
    return Restart(
        start=end / (distance + end),
        scale=1.0 / (distance + end),
        noise=distance / (distance + end),
        correlation=correlation,
    )


def correlated(independent: Tensor, correlation: float, dim: int) -> Tensor:
    """Return noise with covariance I - c 11^T along ``dim`` (size 4), made from independent standard normal noise.

    The matrix square root is I - (1 - sqrt(1 - 4 c)) / 4 * 11^T, so no matrix is needed.
    """
    return independent - (1.0 - math.sqrt(1.0 - 4.0 * correlation)) * independent.mean(dim, keepdim=True)


def restarted(groups: Tensor, fine_before: Tensor, fine_after: Tensor, restart: Restart, independent: Tensor) -> Tensor:
    """Return the latent with which the next stage starts.

    Args:
        groups: Tokens in fours, shape (B, G, 4, D); a group that is one coarse token holds it four times.
        fine_before, fine_after: Which groups are four tokens rather than one, shape (B, G), boolean.
        restart: Scale and noise.
        independent: Standard normal noise, shape (B, G, 4, D).

    Returns:
        Tokens in fours, shape (B, G, 4, D).
    """
    mean_free = math.sqrt(1.0 - restart.correlation)
    upsampled = (fine_after & ~fine_before)[..., None, None]
    still_coarse = (~fine_after)[..., None, None]
    noise = torch.where(upsampled, correlated(independent, restart.correlation, dim=2), mean_free * independent)
    noise = torch.where(still_coarse, mean_free * independent[:, :, :1], noise)
    return restart.scale * groups + restart.noise * noise


def seeded_noise(shape: Sequence[int], seed: int, stage: int, indices: Sequence[int] | None = None) -> Tensor:
    """Return standard normal noise on the CPU; each sample depends only on seed, stage and its own index.

    So the first picture of a batch of four equals that of a batch of one, and no two stages share noise.

    Args:
        shape: (B, ...).
        seed: Seed of the run.
        stage: Number of the stage that the noise is for.
        indices: Which of a seed's samples these are; by default the first B.
    """
    samples = []
    for index in range(shape[0]) if indices is None else indices:
        state = np.random.SeedSequence([seed, stage, index]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) % 2**63)
        samples.append(torch.randn(shape[1:], generator=generator))
    return torch.stack(samples)

"""An adapter's error by noise level, as measured on held-out examples after its training."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True)
class ErrorTable:
    """The relative error of a coarse call's velocity.

    Attributes:
        sigmas: Noise levels, rising.
        errors: At each: root of the mean square of the difference from the model's own velocity, relative to that of the
            velocity itself.

    Raises:
        InvalidInputError: If it is not a table of finite, non-negative errors at rising noise levels.
    """

    sigmas: tuple[float, ...]
    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        good = all(math.isfinite(error) and error >= 0.0 for error in self.errors)
        if not self.sigmas or len(self.sigmas) != len(self.errors) or not rising or not good:
            raise InvalidInputError(
                f"An error table needs an error for each of its rising noise levels, got {self.sigmas} and {self.errors}."
            )

    def at(self, sigma: float) -> float:
        """Return the error at a noise level, interpolated linearly, and constant outside the table."""
        above = bisect_left(self.sigmas, sigma)
        if above == 0:
            return self.errors[0]
        if above == len(self.sigmas):
            return self.errors[-1]
        low, high = self.sigmas[above - 1], self.sigmas[above]
        share = (sigma - low) / (high - low)
        return (1.0 - share) * self.errors[above - 1] + share * self.errors[above]

    @property
    def mean(self) -> float:
        """The mean over the table's noise levels."""
        return sum(self.errors) / len(self.errors)


def spent(scales: Sequence[int], sigmas: Sequence[float], tables: dict[int, ErrorTable]) -> float:
    """Return what a schedule spends: the error of every coarse step, weighted by its share of the noise levels passed.

    If all errors pointed in one direction, this would be the error of the latent, relative to the way from noise to it.

    Args:
        scales: s of every step; 1 spends nothing.
        sigmas: Noise levels, one more than steps.
        tables: Scale -> table.
    """
    lengths = [abs(a - b) for a, b in zip(sigmas, sigmas[1:], strict=False)]
    costs = [0.0 if s == 1 else tables[s].at(sigma) for s, sigma in zip(scales, sigmas, strict=False)]
    return sum(length * cost for length, cost in zip(lengths, costs, strict=True)) / sum(lengths)

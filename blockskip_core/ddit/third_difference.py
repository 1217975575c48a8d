"""How fast a picture changes while it is sampled: the criterion for the patch size of a step.

DDiT (arXiv 2602.16968, Eq. 2-5) takes the third difference of four consecutive latents,
``z[k] - 3 z[k-1] + 3 z[k-2] - z[k-3]``, its standard deviation in every coarse patch, and a percentile of these. That
number depends on the number of steps (it falls with their cube) and on the schedule (steps of unequal length add a term
of their own). :func:`literal` is this form.

:func:`normalised` is ours: the third divided difference of the clean estimate over the noise level, which is exact for
any steps: zero on quadratics, the same number on a cubic however it is sampled. It is given per step of 1/50, so the
paper's threshold, tuned for 50 steps, keeps its meaning.

After a switch the other patch size's own error would look like a change of the picture. :class:`History` therefore moves
everything from the switch on by one constant, chosen so that the third difference of the step before persists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

POINTS = 4
"""Latents that a third difference needs."""
_STEP = 1 / 50
_KEPT = 4


@dataclass(frozen=True)
class Point:
    """One step of a trajectory.

    Attributes:
        sigma: Noise level.
        value: Latent or clean estimate, (B, C, H, W).
    """

    sigma: float
    value: Tensor


def literal(points: Sequence[Point]) -> Tensor:
    """Return the paper's third difference of the last four points (Eq. 4), oldest first."""
    a, b, c, d = (point.value for point in points[-POINTS:])
    return d - 3.0 * c + 3.0 * b - a


def normalised(points: Sequence[Point]) -> Tensor:
    """Return the third derivative over the noise level by the last four points, times (1/50)^3."""
    return math.factorial(3) * _STEP**3 * divided_difference(points[-POINTS:])


def divided_difference(points: Sequence[Point]) -> Tensor:
    """Return f[x0, ..., xk] in Lagrange's form; k is the number of points minus 1. No two noise levels may be equal."""
    total = torch.zeros_like(points[0].value)
    for point in points:
        distances = [point.sigma - other.sigma for other in points if other is not point]
        total = total + point.value / math.prod(distances)
    return total


def extrapolated(points: Sequence[Point], sigma: float) -> Tensor:
    """Return the value at a noise level of the polynomial through all points (Lagrange)."""
    total = torch.zeros_like(points[0].value)
    for point in points:
        others = [other.sigma for other in points if other is not point]
        total = total + point.value * math.prod((sigma - other) / (point.sigma - other) for other in others)
    return total


def variation(difference: Tensor, side: int, percentile: float, frames: int = 1) -> Tensor:
    """Return the percentile over all patches of the standard deviation in a patch (Eq. 5), one number per picture or clip.

    The paper says neither over which axes nor how pictures of a batch count; here: over pixels and channels together,
    unbiased, interpolated linearly between patches.

    Args:
        difference: (B, C F, H, W).
        side: Of a patch in cells.
        percentile: rho, between 0 and 1.
        frames: F; a patch is within one of them.

    Returns:
        Shape (B,).
    """
    patches = rearrange(difference, "b (c f) (h i) (w j) -> b (f h w) (c i j)", f=frames, i=side, j=side)
    return torch.quantile(patches.std(-1), percentile, dim=1)


@dataclass
class History:
    """The last clean estimates of a run, as if all had been made with one patch size.

    Attributes:
        points: Oldest first, corrected.
    """

    points: list[Point] = field(default_factory=list)
    _scale: int = 0
    _offset: Tensor | None = None

    def add(self, sigma: float, value: Tensor, scale: int) -> None:
        """Append an estimate made with patches of a scale; the first estimate after a switch sets the correction.

        Args:
            sigma: Noise level; the same one again replaces the last point.
            value: (B, C, H, W).
            scale: s of the step, 1 for the model's own patches.
        """
        if self.points and self.points[-1].sigma == sigma:
            self.points.pop()
        if self.points and scale != self._scale:
            # A cubic through four points, so that the third difference persists; fewer at the start of a run.
            self._offset = extrapolated(self.points[-_KEPT:], sigma) - value
        self._scale = scale
        corrected = value if self._offset is None else value + self._offset
        self.points = [*self.points[1 - _KEPT :], Point(sigma, corrected)]

    @property
    def is_complete(self) -> bool:
        """Whether there are enough points for a third difference."""
        return len(self.points) >= POINTS

"""The loss of a run as a smoothed curve of bounded length, thinned as it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

LossPoint: TypeAlias = tuple[int, float | None, float | None, float | None]
"""Step, loss, smoothed loss, learning rate. None: unknown, or not a finite number (JSON knows no NaN)."""

MAX_POINTS = 2000


class ExponentialMean:
    """A running mean in which a value from ``span`` steps ago has a third of the weight, bias-corrected as in Adam.

    So the first mean is the first value, and the mean of equal values is that value.

    Args:
        span: Approximate number of values that it averages over.
    """

    def __init__(self, span: float) -> None:
        self._decay = 1.0 - 1.0 / max(1.0, span)
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float | None:
        """Add a value and return the mean so far; values that are not finite are ignored."""
        if math.isfinite(value):
            self._sum = self._decay * self._sum + (1.0 - self._decay) * value
            self._weight = self._decay * self._weight + (1.0 - self._decay)
        return self._sum / self._weight if self._weight else None


class LossCurve:
    """Collects the losses of a run, one step at a time.

    When ``limit`` points are reached, neighbours are merged, and from then on a point covers twice as many steps: the
    mean loss, and the last step's smoothed loss and learning rate. So memory is bounded however long a run is, and a
    high loss stays visible as a higher mean.

    Args:
        span: Approximate number of steps that the smoothed loss averages over; see :class:`ExponentialMean`.
        limit: Maximum number of points to keep, 2 or more.
    """

    def __init__(self, span: float, limit: int = MAX_POINTS) -> None:
        self._smoothed = ExponentialMean(span)
        self._limit = max(2, limit)
        self._points: list[LossPoint] = []
        self._open: list[LossPoint] = []
        self._stride = 1
        self.count = 0

    def add(self, step: int, loss: float, learning_rate: float | None = None) -> LossPoint:
        """Add a step and return its point."""
        point = (step, finite(loss), finite(self._smoothed.add(loss)), finite(learning_rate))
        self.count += 1
        self._open.append(point)
        if len(self._open) == self._stride:
            self._points.append(_merged(self._open))
            self._open = []
        if len(self._points) == self._limit:
            self._points = merged_points(self._points, 2)
            self._stride *= 2
        return point

    def points(self, limit: int | None = None) -> list[LossPoint]:
        """Return the curve so far, with at most ``limit`` points."""
        points = self._points + ([_merged(self._open)] if self._open else [])
        return merged_points(points, -(-len(points) // max(1, limit))) if limit else points


def smoothing_span(steps: int) -> float:
    """Return the number of steps over which a run's loss is smoothed: a tenth of ``steps``, between 10 and 50."""
    return min(50.0, max(10.0, steps / 10.0))


def finite(value: float | None) -> float | None:
    """Return a number with six significant digits, or None if JSON has no form for it."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def merged_points(points: Sequence[LossPoint], stride: int) -> list[LossPoint]:
    """Return the curve with every ``stride`` neighbours merged into one point; the last point may cover fewer."""
    stride = max(1, stride)
    return [_merged(points[start : start + stride]) for start in range(0, len(points), stride)]


def _merged(points: Sequence[LossPoint]) -> LossPoint:
    losses = [loss for _, loss, _, _ in points if loss is not None]
    step, _, smoothed, learning_rate = points[-1]
    return step, finite(sum(losses) / len(losses)) if losses else None, smoothed, learning_rate

"""The loss of a run as a curve of bounded length: smoothed, and thinned as it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

LossPoint: TypeAlias = tuple[int, float | None, float | None, float | None]
"""Step, loss, smoothed loss, learning rate. None: unknown, or not a finite number (JSON knows no NaN)."""

MAX_POINTS = 2000


class ExponentialMean:
    """A mean in which a value of ``span`` steps ago counts a third; corrected for its start at zero, as in Adam.

    So the first value is itself, and equal values stay as they are.

    Args:
        span: About how many values it is over.
    """

    def __init__(self, span: float) -> None:
        self._decay = 1.0 - 1.0 / max(1.0, span)
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float | None:
        """Take the next value in; return the mean so far. Values that are not finite leave it as it is."""
        if math.isfinite(value):
            self._sum = self._decay * self._sum + (1.0 - self._decay) * value
            self._weight = self._decay * self._weight + (1.0 - self._decay)
        return self._sum / self._weight if self._weight else None


class LossCurve:
    """Collects the losses of a run, one step at a time.

    At ``limit`` points, neighbours are merged and from then on a point covers twice as many steps: mean loss, and
    the last step's smoothed loss and learning rate. So the memory of a run is bounded, however long it is, and a high
    loss stays visible as a higher mean.

    Args:
        span: About how many steps the smoothed loss is over; see :class:`ExponentialMean`.
        limit: The most points that are kept, 2 or more.
    """

    def __init__(self, span: float, limit: int = MAX_POINTS) -> None:
        self._smoothed = ExponentialMean(span)
        self._limit = max(2, limit)
        self._points: list[LossPoint] = []
        self._open: list[LossPoint] = []
        self._stride = 1
        self.count = 0

    def add(self, step: int, loss: float, learning_rate: float | None = None) -> LossPoint:
        """Take the next step in; return its point."""
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
    """Return over how many steps the loss of a run of ``steps`` is smoothed: a tenth of it, from 10 to 50."""
    return min(50.0, max(10.0, steps / 10.0))


def finite(value: float | None) -> float | None:
    """Return a number with six significant digits; None for what JSON could not say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def merged_points(points: Sequence[LossPoint], stride: int) -> list[LossPoint]:
    """Return the curve with ``stride`` neighbours made one; fewer than those are left at the end stay one too."""
    stride = max(1, stride)
    return [_merged(points[start : start + stride]) for start in range(0, len(points), stride)]


def _merged(points: Sequence[LossPoint]) -> LossPoint:
    losses = [loss for _, loss, _, _ in points if loss is not None]
    step, _, smoothed, learning_rate = points[-1]
    return step, finite(sum(losses) / len(losses)) if losses else None, smoothed, learning_rate

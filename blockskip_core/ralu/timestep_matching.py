"""Timestep matching: which noise levels each stage steps through.

A restart goes back in time, so some times are passed twice. The steps are spread such that all stages together visit
times as often as the model's schedule intends, with times that are passed twice counted twice.

Source: RALU (arXiv 2507.08422), section on timestep matching and supplement S12. With F_h(t) = h t / (1 + (h - 1) t)
the distribution of times of a schedule with shift h, f_h its density, and f_{h,s,e} the density cut to [s, e]:

    target(t)  ~  f_shift(t) + sum_{k<K} (e_k - s_{k+1}) f_{shift, s_{k+1}, e_k}(t)
    ours(t)    ~  sum_k n_k f_{h_k, s_k, e_k}(t),    n_k steps in stage k
    h_1 ... h_K and c minimise the distance between the two

Presets are the published numbers. For other steps and ends :func:`solved_plan` works like the published code: the
square root of the Jensen-Shannon divergence (natural logarithm) on 1000 points, by L-BFGS-B from h = 3 and
1 / sqrt(c) = 2, with h in [0.5, 10] and 1 / sqrt(c) in [2, 100]. The minimum is flat and the solver stops early, so another
starting point gives other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from ..errors import InvalidInputError
from .noise_matching import Restart, restart_after

MAX_STAGES = 3
DEFAULT_SHIFT = 3.0  # of the published code's scheduler
_GRID_POINTS = 1000


@dataclass(frozen=True)
class StagePlan:
    """Steps and noise levels of all stages. The last stage is at full resolution, the first of several at half of it.

    Attributes:
        steps: Steps of each stage, one to three stages.
        ends: Time at which each stage ends, ascending; the last is 1.
        shifts: h of each stage.
        correlation: c of the noise that is added between stages; ignored with one stage.

    Raises:
        InvalidInputError: If the lists do not fit together.
    """

    steps: tuple[int, ...]
    ends: tuple[float, ...]
    shifts: tuple[float, ...]
    correlation: float = 0.25

    def __post_init__(self) -> None:
        check_stages(self.steps, self.ends)
        if len(self.shifts) != len(self.steps) or not all(math.isfinite(h) and h > 0.0 for h in self.shifts):
            raise InvalidInputError(f"Expected one positive shift per stage, got {list(self.shifts)}.")
        self.restarts  # noqa: B018  checks ends and correlation

    @cached_property
    def restarts(self) -> tuple[Restart, ...]:
        """How each stage but the last hands over to the next."""
        return tuple(restart_after(end, self.correlation) for end in self.ends[:-1])

    @cached_property
    def sigmas(self) -> tuple[tuple[float, ...], ...]:
        """Noise levels of each stage, one more than it has steps."""
        starts = (0.0, *(restart.start for restart in self.restarts))
        stages = zip(starts, self.ends, self.shifts, self.steps, strict=True)
        return tuple(_stage_sigmas(start, end, shift, steps) for start, end, shift, steps in stages)


def check_stages(steps: Sequence[int], ends: Sequence[float]) -> None:
    """Refuse numbers of steps and end times that do not form valid stages.

    Raises:
        InvalidInputError: Saying what is wrong.
    """
    if not 1 <= len(steps) <= MAX_STAGES or len(steps) != len(ends):
        raise InvalidInputError(
            f"Expected the same number of steps and of end times, one to {MAX_STAGES} of each, got {len(steps)} and "
            f"{len(ends)}."
        )
    if any(number < 1 for number in steps):
        raise InvalidInputError(f"Every stage needs at least one step, got {list(steps)}.")
    rising = all(a < b for a, b in zip(ends, ends[1:], strict=False))
    if not rising or ends[0] <= 0.0 or ends[-1] != 1.0:
        raise InvalidInputError(f"End times must rise from above 0 to exactly 1 at the last stage, got {list(ends)}.")


def _preset(steps: Sequence[int], ends: Sequence[float], shifts: Sequence[float], root: float) -> StagePlan:
    return StagePlan(tuple(steps), tuple(ends), tuple(shifts), 1.0 / root**2)


# As printed: Table S1 of the paper's third version; "FLUX 4x" from the published code of the first.
PRESETS: Mapping[str, StagePlan] = MappingProxyType(
    {
        "FLUX 4x": _preset((5, 6, 7), (0.3, 0.45, 1.0), (5.019, 2.589, 2.226), 6.317),
        "FLUX 5x": _preset((4, 5, 6), (0.3, 0.45, 1.0), (5.12, 2.64, 2.25), 7.52),
        "FLUX 7x": _preset((2, 3, 5), (0.2, 0.3, 1.0), (8.14, 2.86, 2.19), 6.26),
        "SD3 2x": _preset((5, 6, 9), (0.2, 0.3, 1.0), (6.21, 2.23, 1.97), 4.13),
        "SD3 3x": _preset((3, 3, 6), (0.25, 0.3, 1.0), (6.40, 2.60, 2.23), 6.26),
    }
)


def solved_plan(steps: Sequence[int], ends: Sequence[float], shift: float = DEFAULT_SHIFT) -> StagePlan:
    """Return the plan whose h and c fit these stages.

    Args:
        steps: Steps of each stage.
        ends: Time at which each stage ends; the last is 1.
        shift: Shift of the schedule intended for the model.

    Raises:
        InvalidInputError: If steps, ends or shift cannot be used.
    """
    from scipy.optimize import minimize

    check_stages(steps, ends)
    if not 0.1 <= shift <= 100.0:
        raise InvalidInputError(f"The shift must be between 0.1 and 100, got {shift}.")
    if len(steps) == 1:  # nothing is passed twice: the target is the schedule itself
        return StagePlan(tuple(steps), tuple(ends), (shift,))
    restart_after(ends[0], 0.25)
    bounds = [(0.5, 10.0)] * len(steps) + [(2.0, 100.0)]
    start = [3.0] * len(steps) + [2.0]
    found = minimize(_distance, start, args=(steps, ends, shift), method="L-BFGS-B", bounds=bounds).x
    return _preset(steps, ends, [float(h) for h in found[:-1]], float(found[-1]))


def _distance(parameters: np.ndarray, steps: Sequence[int], ends: Sequence[float], shift: float) -> float:
    """Return how far the visited times are from the target: shifts of each stage, then 1 / sqrt(c)."""
    from scipy.spatial.distance import jensenshannon

    shifts, correlation = parameters[:-1], 1.0 / parameters[-1] ** 2
    starts = [0.0, *(restart_after(end, correlation).start for end in ends[:-1])]
    times = np.linspace(0.0, 1.0, _GRID_POINTS)
    ours = sum(
        number * _cut_density(times, h, start, end)
        for number, h, start, end in zip(steps, shifts, starts, ends, strict=True)
    )
    target = _cut_density(times, shift, 0.0, 1.0)
    for start, end in zip(starts[1:], ends[:-1], strict=True):
        target = target + (end - start) * _cut_density(times, shift, start, end)
    return float(jensenshannon(target, ours))


def _cut_density(times: np.ndarray, shift: float, start: float, end: float) -> np.ndarray:
    inside = (times >= start) & (times <= end)
    density = shift / (1.0 + (shift - 1.0) * times) ** 2
    return inside * density / (_share_before(end, shift) - _share_before(start, shift))


def _share_before(time: float, shift: float) -> float:
    return shift * time / (1.0 + (shift - 1.0) * time)


def _stage_sigmas(start: float, end: float, shift: float, steps: int) -> tuple[float, ...]:
    """Return noise levels that are evenly spaced before the shift acts."""
    first, last = (sigma / (shift - (shift - 1.0) * sigma) for sigma in (1.0 - start, 1.0 - end))
    even = np.linspace(first, last, steps + 1)
    sigmas = shift * even / (1.0 + (shift - 1.0) * even)
    sigmas[0], sigmas[-1] = 1.0 - start, 1.0 - end  # exact, without rounding errors
    return tuple(float(sigma) for sigma in sigmas)

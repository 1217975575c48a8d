"""Schedules that are fixed before sampling: windows typed by the user, or the best within an error budget.

The budget is not the paper's (DDiT, arXiv 2602.16968), which decides while sampling. An adapter's own error table
(``error_table``) says what a coarse step spends, and its size what it saves; which steps to make coarse is then a
multiple-choice knapsack, solved exactly up to the rounding of the errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import InvalidInputError
from .error_table import ErrorTable

_GRAINS = 4000  # the budget is this many units; errors are rounded up to whole units
_WINDOW = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?:\s*(\d+)\s*")


class Window(NamedTuple):
    """Steps with one patch size.

    Attributes:
        text: As typed.
        first, last: Its steps, from 1.
        scale: Their patch size, in multiples of the model's own.
    """

    text: str
    first: int
    last: int
    scale: int


def typed_windows(text: str) -> list[Window]:
    """Return the windows in text such as ``"2-9: 2, 12-14: 4"``, whatever their steps and scales.

    Raises:
        InvalidInputError: If it is not such a text.
    """
    windows = []
    for part in map(str.strip, filter(str.strip, text.split(","))):
        found = _WINDOW.fullmatch(part)
        if not found:
            raise InvalidInputError(f"Windows are written like `2-9: 2, 12-14: 4`, got {part!r}.")
        windows.append(Window(part, int(found[1]), int(found[2] or found[1]), int(found[3])))
    return windows


def scales_in_windows(text: str, steps: int, known: Sequence[int]) -> list[int]:
    """Return the scale of every step from text such as ``"2-9: 2, 12-14: 4"``; steps count from 1, others get 1.

    Raises:
        InvalidInputError: If it is not such a text, names a step twice or out of range, or an unknown scale.
    """
    scales = [0] * steps
    for part, first, last, scale in typed_windows(text):
        if not 1 <= first <= last <= steps:
            raise InvalidInputError(f"The window {part!r} is not within the steps 1 to {steps} of this run.")
        if scale not in known:
            raise InvalidInputError(
                f"The window {part!r} asks for patches of {scale} times the model's side, the adapters are for "
                f"{', '.join(map(str, known))}."
            )
        if any(scales[first - 1 : last]):
            raise InvalidInputError(f"The window {part!r} overlaps another. Give every step one patch size.")
        scales[first - 1 : last] = [scale] * (last - first + 1)
    return [scale or 1 for scale in scales]


def scales_within_budget(
    sigmas: Sequence[float],
    tables: Mapping[int, ErrorTable],
    operations: Mapping[int, float],
    budget: float,
    *,
    first_own: int = 1,
    last_own: int = 1,
) -> list[int]:
    """Return the scale of every step that saves the most operations while spending at most ``budget``.

    Args:
        sigmas: Noise levels, one more than steps.
        tables: Scale -> error.
        operations: Scale -> operations of a step, also for scale 1.
        budget: See ``error_table.spent``.
        first_own: Steps of the model's own size at the start.
        last_own: And at the end.

    Raises:
        InvalidInputError: If the budget is not between 0 and 1, or the noise levels do not change.
    """
    if not 0.0 <= budget <= 1.0:
        raise InvalidInputError(f"The error budget must be between 0 and 1, got {budget}.")
    steps = len(sigmas) - 1
    total = sum(abs(a - b) for a, b in zip(sigmas, sigmas[1:], strict=False))
    if not total > 0.0:
        raise InvalidInputError(f"Noise levels must fall from step to step, got {list(sigmas)[:3]} and so on.")
    # best[u]: most operations saved with at most u units, and the choices that do it
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (_GRAINS + 1)
    for step in range(steps):
        own = step < first_own or step >= steps - last_own or budget == 0.0
        share = abs(sigmas[step] - sigmas[step + 1]) / total
        shares = {} if own else {scale: table.at(sigmas[step]) * share / budget for scale, table in tables.items()}
        units = {scale: math.ceil(part * _GRAINS - 1e-9) for scale, part in shares.items()}
        best = _with_another_step(best, units, operations)
    return list(best[-1][1])


def _with_another_step(
    best: list[tuple[float, tuple[int, ...]]], units: Mapping[int, int], operations: Mapping[int, float]
) -> list[tuple[float, tuple[int, ...]]]:
    """Return the table of best choices after one more step, whose coarse sizes cost ``units``."""
    after = []
    for limit in range(len(best)):
        saved, choices = best[limit]
        found = (saved, (*choices, 1))
        for scale, cost in units.items():
            if cost <= limit:
                before, earlier = best[limit - cost]
                gained = before + operations[1] - operations[scale]
                if gained > found[0]:
                    found = (gained, (*earlier, scale))
        after.append(found)
    return after

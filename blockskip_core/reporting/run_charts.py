"""Drawings of a run as inline SVG: blocks, losses, crops. No scripts; colours come from the document's classes.

The number of points is bounded, however long a run was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.schedule import Draw
from ..selection.selection import BlockRole, BlockSelection
from ..units import format_bytes
from .loss_curve import ExponentialMean, smoothing_span
from .markup import Markup, element, joined, place
from .pictures import evenly

WIDTH = 480  # units of every drawing; on a phone one unit is about 0.7 px
LEFT, RIGHT, TOP, BOTTOM = 66, 10, 10, 28  # margins
MAX_RAW, MAX_SMOOTH, MAX_CROPS = 400, 300, 400  # points
WHAT: dict[BlockRole, str] = {
    "front": "skipped at the front", "trained": "trained", "frozen": "run without adapters", "back": "skipped near the end",
}  # fmt: skip
NO_SPREAD = 1e-6  # values that differ by less than this fraction are drawn as equal


def block_row(selection: BlockSelection, names: Sequence[str]) -> Markup:
    """Return the model's blocks in order, those that run taller. Every block has a tooltip that says what it is."""
    cell = min(40.0, WIDTH / selection.num_blocks)
    shapes = []
    for index in range(selection.num_blocks):
        role = selection.role_of(index)
        top, height = (4, 44) if index in selection.kept else (14, 24)
        size = f", {format_bytes(selection.block_bytes[index])}" if selection.block_bytes else ""
        rect = element(
            "rect",
            element("title", f"{names[index]}: {WHAT[role]}{size}"),
            x=place(index * cell + cell * 0.08),
            y=top,
            width=place(cell * 0.84),
            height=height,
            class_=role,
        )
        shapes.append(rect)
    for number, index in enumerate(_first_of_each_kind(names)):
        x, y = index * cell, 67 + 18 * (number % 2)  # in two rows, because a kind may be narrow
        shapes.append(element("line", x1=place(x), y1=50, x2=place(x), y2=y, class_="axis"))
        shapes.append(element("text", _kind(names[index]), x=place(x + 3), y=y, class_="label"))
    spans = [
        (selection.front, "skipped"), (len(selection.middle), "trained"), (selection.frozen, "frozen"),
        (selection.back, "skipped"), (selection.tail, "trained"),
    ]  # fmt: skip
    counts = ", ".join(f"{count} {what}" for count, what in spans if count)
    return _drawing(f"Blocks in order: {counts}", 90, shapes)


def loss_chart(losses: Sequence[float], per_step: int, resumed_at: int = 0) -> Markup:
    """Return the loss of every forward pass in a faint line, and a smoothed line as in the live chart.

    In a long run the raw losses are drawn as bars over their range.

    Args:
        losses: Loss of every forward pass. Values that are not finite are left out.
        per_step: Forward passes per optimiser step.
        resumed_at: Number of steps made by an earlier run; marked if not 0.
    """
    known = [(number, loss) for number, loss in enumerate(losses, 1) if math.isfinite(loss)]
    if not known:
        return element("p", "No loss is known.")
    steps, values = [number / per_step for number, _ in known], [loss for _, loss in known]
    x = _Scale.over(steps, LEFT, WIDTH - RIGHT, pad=0.5)
    y = _Scale.over(values, 220 - BOTTOM, TOP)
    shapes = [*_frame(x, y, 220, whole_x=True)]
    if 0 < resumed_at and x.low <= resumed_at <= x.high:
        at = place(x(resumed_at))
        mark = element("title", f"resumed at step {resumed_at}")
        shapes.append(element("line", mark, x1=at, y1=TOP, x2=at, y2=220 - BOTTOM, class_="mark"))
    if len(values) == 1:
        shapes.append(element("path", d=_dots(steps, values, x, y), class_="dots single"))
    else:
        smoothed = ExponentialMean(smoothing_span(len(losses) // per_step) * per_step)
        shapes.append(element("path", d=_raw_path(steps, values, x, y), class_="raw"))
        shapes.append(element("path", d=_smooth_path(steps, values, x, y, smoothed), class_="smooth"))
    return _drawing(f"Loss by step, {len(values)} forward passes", 220, shapes)


def crop_chart(draws: Sequence[Draw]) -> Markup:
    """Return a chart of side and noise level of the crops that were trained on, at most ``MAX_CROPS`` of them."""
    if not draws:
        return element("p", "No crop was used in training.")
    x = _Scale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = _Scale.over([draw.side for draw in draws], 160 - BOTTOM, TOP)
    shown = [draws[index] for index in evenly(len(draws), MAX_CROPS)]
    dots = _dots([draw.sigma for draw in shown], [draw.side for draw in shown], x, y)
    shapes = [*_frame(x, y, 160), element("path", d=dots, class_="dots")]
    return _drawing("Side of the crops in pixels by noise level t", 160, shapes)


@dataclass(frozen=True)
class _Scale:
    """Maps values from ``low`` to ``high``, which differ, to the range from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, pad: float | None = None) -> _Scale:
        """Return a scale that covers all values; if they are equal, it extends ``pad`` or a tenth to either side."""
        low, high = min(values), max(values)
        largest = max(abs(low), abs(high))
        if high - low <= max(NO_SPREAD * largest, 1e-30):
            pad = pad or largest / 10 or 1.0
            low, high = low - max(pad, 1e-30), high + max(pad, 1e-30)
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> list[tuple[float, str]]:
        """Return up to six round values within the scale, with their labels."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        largest, last_place = max(abs(self.low), abs(self.high)), math.floor(math.log10(step))
        decimals, digits = max(0, -last_place), math.floor(math.log10(largest)) - last_place + 1
        plain = decimals <= 6 and largest < 1e6
        values = [number * step for number in range(first, last + 1)]
        return [(value, f"{value:,.{decimals}f}" if plain else f"{value:.{digits}g}") for value in values]


def _frame(x: _Scale, y: _Scale, height: int, *, whole_x: bool = False) -> list[Markup]:
    """Return grid lines and labels."""
    shapes = []
    for value, label in y.ticks():
        at = y(value)
        shapes.append(element("line", x1=LEFT, y1=place(at), x2=WIDTH - RIGHT, y2=place(at), class_="grid"))
        shapes.append(element("text", label, x=LEFT - 6, y=place(at + 5), class_="label", text_anchor="end"))
    for value, label in x.ticks(whole=whole_x):
        at = min(x(value), WIDTH - RIGHT - 4.5 * len(label))
        shapes.append(element("text", label, x=place(at), y=height - 8, class_="label", text_anchor="middle"))
    return shapes


def _raw_path(steps: Sequence[float], values: Sequence[float], x: _Scale, y: _Scale) -> str:
    if len(values) <= MAX_RAW:
        return _line(steps, values, x, y)
    bars = []
    for number in range(MAX_RAW):
        part = slice(number * len(values) // MAX_RAW, (number + 1) * len(values) // MAX_RAW)
        middle = steps[(part.start + part.stop) // 2]
        bars.append(f"M{place(x(middle))} {place(y(min(values[part])))}V{place(y(max(values[part])))}")
    return "".join(bars)


def _smooth_path(
    steps: Sequence[float], values: Sequence[float], x: _Scale, y: _Scale, smoothed: ExponentialMean
) -> str:
    means = [smoothed.add(value) for value in values]
    shown = [(steps[index], mean) for index in evenly(len(values), MAX_SMOOTH) if (mean := means[index]) is not None]
    return _line([step for step, _ in shown], [mean for _, mean in shown], x, y)


def _dots(across: Sequence[float], up: Sequence[float], x: _Scale, y: _Scale) -> str:
    """Return lines of zero length, which appear as dots because of the document's round line ends."""
    return "".join(f"M{place(x(a))} {place(y(b))}h0" for a, b in zip(across, up, strict=True))


def _line(steps: Sequence[float], values: Sequence[float], x: _Scale, y: _Scale) -> str:
    return "M" + "L".join(f"{place(x(step))} {place(y(value))}" for step, value in zip(steps, values, strict=True))


def _first_of_each_kind(names: Sequence[str]) -> list[int]:
    return [index for index, name in enumerate(names) if index == 0 or _kind(name) != _kind(names[index - 1])]


def _kind(name: str) -> str:
    """Return "double blocks" for "double_blocks.3"."""
    return name.split(".")[0].replace("_", " ")


def _drawing(title: str, height: int, shapes: Sequence[Markup]) -> Markup:
    return element(
        "svg", joined(*shapes), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title, class_="drawing"
    )

"""Held-out gain against forward passes: table, plot, and how many passes reach the same gain. Part of ``words``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

Row = dict[str, Any]
Points = list[tuple[int, float]]  # (forward passes, gain)
Scale = dict[str, tuple[float, float]]  # subject -> held-out loss where the gain is 0 and where it is 1
STYLES = {
    "gradient": ("--", "o"), "defaults": ("-", "o"), "stored": ((0, (1, 2)), "x"), "paper": (":", "s"), "stronger": ("-.", "^"),
}  # fmt: skip
"""Groups of the plot, in the order of its legend, and their lines and markers; within a group colours differ."""
NEW_EXAMPLES = "new examples in every step"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of a run's steps, after which the held-out loss is measured too."""


class Curve:
    """Words on the way, to measure after the run: [forward passes, held-out loss].

    Args:
        steps: Steps of the run.
        passes: Forward passes of a step.
    """

    def __init__(self, steps: int, passes: int) -> None:
        self._passes = passes
        self._due = {max(1, round(share * steps)) for share in SHARES} - {steps}
        self._words: dict[int, Tensor] = {}

    def after(self, step: int, word: Tensor) -> None:
        """Keep a word, if it is due after so many steps."""
        if step in self._due:
            self._words[step] = word.detach().clone()

    def measured(self, loss: Callable[[Tensor], float]) -> list[tuple[int, float]]:
        """Return the points."""
        return [(step * self._passes, loss(word)) for step, word in self._words.items()]


def curves(rows: Sequence[Row], scale: Scale) -> dict[str, Points]:
    """Return each arm's mean gain over its runs at the numbers of passes where it was measured, from (0, 0)."""
    by_arm: dict[str, list[Points]] = {}
    for row in rows:
        if row.get("curve") and row["subject"] in scale:
            nothing, all_ = scale[row["subject"]]
            points = [*map(tuple, row["curve"]), (row["forwards"], row["loss"])]
            by_arm.setdefault(row["arm"], []).append([(n, (nothing - loss) / (nothing - all_)) for n, loss in points])
    return {
        arm: [(0, 0.0), *((at[0][0], statistics.fmean(gain for _, gain in at)) for at in zip(*runs, strict=True))]
        for arm, runs in by_arm.items()
    }


def passes_to(points: Points, gain: float) -> float | None:
    """Return the passes at which a curve first has a gain, interpolated linearly; None if it never has."""
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if high >= gain:
            return before + (after - before) * (gain - low) / (high - low)
    return None


def table(rows: Sequence[Row], scale: Scale) -> list[str]:
    """Return the table of gains on the way."""
    found = curves(rows, scale)
    if not found:
        return []
    places = sorted({n for points in found.values() for n, _ in points[1:]})
    lines = [
        "## Gain on the way", "",
        "Mean gain after so many forward passes, of the runs in which it was measured (their number in brackets). Step sizes fall "
        "to 0 at a run's end, except the paper's, so a shorter run would be better than the beginning of a long one.", "",
        f"| arm | {' | '.join(f'{n:,}' for n in places)} |", "|---" * (len(places) + 1) + "|",
    ]  # fmt: skip
    for arm, points in found.items():
        at, runs = dict(points), sum(row.get("arm") == arm and bool(row.get("curve")) for row in rows)
        cells = [f"{at[n]:.2f}" if n in at else "" for n in places]
        lines.append(f"| {arm} ({runs}) | {' | '.join(cells)} |")
    return [*lines, ""]


def plotted_as(row: Row) -> str:
    """Return the group in which a row's arm is plotted: with new examples in every step beside the defaults."""
    return "defaults" if row["arm"].startswith(NEW_EXAMPLES) else str(row["group"])


def plot(rows: Sequence[Row], scale: Scale, file: Path) -> None:
    """Plot the curves of the arms that are compared with gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {row["arm"]: plotted_as(row) for row in rows if "arm" in row}
    found = curves([row for row in rows if groups.get(row.get("arm")) in STYLES], scale)
    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    for group, (line, marker) in STYLES.items():
        for number, arm in enumerate(arm for arm in found if groups[arm] == group):
            axes.plot(
                *zip(*found[arm], strict=True),
                linestyle=line,
                marker=marker,
                markersize=3,
                color=f"C{number}",
                label=arm,
            )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("forward passes (gradient: and as many backward passes)")
    axes.set_ylabel("gain in held-out loss (1: gradient textual inversion)")
    axes.set_ylim(-1.0, 1.1)  # what is worse than that is not compared
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)

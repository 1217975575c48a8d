"""The speed benchmark's table, targets and plot, from its rows."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rounds = dict[int, float]  # round -> median seconds of that round


@dataclass(frozen=True)
class Claim:
    """A target: the ratio of two arms, with a lower or upper limit."""

    text: str
    over: str
    under: str
    limit: float
    at_least: bool


def claims(large: int, small: int) -> list[Claim]:
    """Return the targets. A ratio is the seconds of ``over`` divided by those of ``under``, within a round."""
    from speed_arms import core_name, forward_name, ours_name, plain_name, precompute_name

    found = []
    for on in (True, False):
        what = "checkpointing" if on else "no checkpointing"
        ours = ours_name(0.5, small, on)
        found += [
            Claim(f"50% at {small} px against core's trainer at {large} px, {what}: times faster",
                  core_name(large, what), ours, 4.0, True),
            Claim(f"50% at {small} px against a plain LoRA at {large} px, {what}: times faster",
                  plain_name(large, on), ours, 4.0, True),
        ]  # fmt: skip
    for size in (large, small):
        for on in (True, False):
            text = f"50% against no skip, {size} px, {'checkpointing' if on else 'no checkpointing'}: times faster"
            found.append(Claim(text, ours_name(0.0, size, on), ours_name(0.5, size, on), 1.8, True))
    for size in (large, small):
        text = f"precomputing a draw against a plain forward, {size} px: times as long"
        found.append(Claim(text, precompute_name(size), forward_name(size), 1.15, False))
    for size in (large, small):
        disk, memory = ours_name(0.5, size, True, "from disk"), ours_name(0.5, size, True)
        found.append(Claim(f"a step with residuals from disk against memory, {size} px: times as long",
                           disk, memory, 1.05, False))  # fmt: skip
    return found


def rows(file: Path) -> list[Row]:
    """Return all rows of a file, or none if there is no file yet."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def first_sentence(error: Exception, most: int = 160) -> str:
    """Return the first sentence of an error, on one line and not too long."""
    text = re.split(r"(?<=[.!?])\s|\n", str(error).strip() or type(error).__name__, maxsplit=1)[0].replace("|", "/")
    return text if len(text) <= most else text[: most - 1] + "…"


def told(outcome: Row) -> str:
    """Return one arm in one round as text for the log."""
    return outcome["error"] if "error" in outcome else f"{statistics.median(outcome['seconds']):.3f} s"


def by_round(found: Iterable[Row], arm: str) -> Rounds:
    """Return the median seconds of an arm in each round."""
    return {row["round"]: statistics.median(row["seconds"]) for row in found if row["arm"] == arm and "seconds" in row}


def ratios(found: list[Row], over: str, under: str) -> list[float]:
    """Return the seconds of one arm divided by those of another, in each round that has both."""
    above, below = by_round(found, over), by_round(found, under)
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Return median, minimum and maximum as text."""
    told = form(statistics.median(values))
    return told if len(values) == 1 else f"{told} ({form(min(values))} to {form(max(values))})"


def seconds(value: float) -> str:
    """Return seconds as text."""
    return f"{value:.3g}"


def table(found: list[Row]) -> list[str]:
    """Return the arms as a Markdown table, in the order of their first run."""
    first = found[0]
    from speed_arms import core_name, plain_name

    references = (core_name(first["large"], "checkpointing"), plain_name(first["large"], True))
    lines = [
        f"| arm | seconds | {references[0]}, by this | {references[1]}, by this |",
        "|---|---|---|---|",
    ]
    part = None
    ordered = sorted(found, key=lambda row: row["round"])
    for name in dict.fromkeys(row["arm"] for row in ordered if row["round"] == 0):
        own = [row for row in ordered if row["arm"] == name]
        if own[0]["part"] != part:
            part = own[0]["part"]
            lines.append(f"| **{part}, per {own[0]['unit']}** | | | |")
        error = next((row["error"] for row in own if "error" in row), None)
        if error:
            lines.append(f"| {name} | {error} | | |")
            continue
        against = [ratios(found, reference, name) if own[0]["unit"] == "step" else [] for reference in references]
        columns = [spread(values, lambda value: f"{value:.2f}") if values else "" for values in against]
        lines.append(f"| {name} | {spread(list(by_round(own, name).values()), seconds)} | {' | '.join(columns)} |")
    return lines


def targets(found: list[Row]) -> list[str]:
    """Return every claim with its target and the measurement."""
    lines = ["| target | wanted | measured, by round | met |", "|---|---|---|---|"]
    for claim in claims(found[0]["large"], found[0]["small"]):
        wanted = f"{'at least' if claim.at_least else 'at most'} {claim.limit:g}"
        values = ratios(found, claim.over, claim.under)
        if not values:
            lines.append(f"| {claim.text} | {wanted} | not measured: {_missing(found, claim)} | |")
            continue
        middle = statistics.median(values)
        met = middle >= claim.limit if claim.at_least else middle <= claim.limit
        lines.append(
            f"| {claim.text} | {wanted} | {spread(values, lambda v: f'{v:.2f}')} | {'yes' if met else '**no**'} |"
        )
    lines.append("| operations of a step against a plain LoRA on all blocks, 512 px | at most 0.25 | counted in "
                 "another benchmark | |")  # fmt: skip
    return lines


def _missing(found: list[Row], claim: Claim) -> str:
    for name in (claim.over, claim.under):
        if not by_round(found, name):
            return f"{name} failed" if any(row["arm"] == name for row in found) else f"{name} was not run"
    return "no round has both"


def write(stem: Path) -> None:
    """Write ``<stem>.md`` and ``<stem>.png`` from the newest set of rows in ``<stem>.jsonl``."""
    every = rows(stem.with_suffix(".jsonl"))
    if not every:
        raise SystemExit(f"There are no rows in {stem.with_suffix('.jsonl')}.")
    found = [row for row in every if row["key"] == every[-1]["key"]]
    first = found[0]
    rounds = 1 + max(row["round"] for row in found)
    text = [
        "# Speed",
        "",
        f"{first['date']} to {found[-1]['date']}, {first['machine']}; {first['versions']}.",
        "",
        f"A FLUX of ComfyUI's own class with random weights, shape `{first['shape']}` of `benchmarks/speed_model.py`. "
        f"{first['reason']} {rounds} round(s), {first['steps']} counted step(s) of each arm in a round after one for "
        f"warming up; batch 1, rank 16, AdamW. {first['draws']} draws are precomputed together. Values are the median "
        "of the rounds, with minimum and maximum in brackets.",
        "",
        *targets(found),
        "",
        *table(found),
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    plot(found, stem.with_suffix(".png"))


def plot(found: list[Row], file: Path) -> None:
    """Plot the seconds of every arm, with its rounds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {row["arm"]: row["part"] for row in found if "seconds" in row}
    colours = list(dict.fromkeys(parts.values()))
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(parts) + 1.2), layout="constrained")
    for height, (name, part) in enumerate(reversed(parts.items())):
        values = list(by_round(found, name).values())
        colour = f"C{colours.index(part)}"
        axes.barh(height, statistics.median(values), color=colour, alpha=0.55, height=0.7)
        axes.plot(values, [height] * len(values), "o", color=colour, markersize=2.5)
    axes.set_yticks(range(len(parts)), list(reversed(parts)), fontsize=8)
    axes.set_xlabel("seconds per step (per draw for precomputing)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}", alpha=0.55) for i in range(len(colours))]
    axes.legend(handles, colours, fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

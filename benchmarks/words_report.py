"""The table of the benchmark ``words``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import words_curves

Row = dict[str, Any]
GROUPS = {
    "start": "Before training",
    "gradient": "Gradient textual inversion, for comparison (a backward pass for each forward pass in addition)",
    "limit": "What a gradient gets from as many numbers about the slope as the defaults get from their passes",
    "paper": "ZOODiP with the paper's settings, and without its parts",
    "defaults": "This package's defaults",
    "stored": "The defaults with the model's weights in another format while learning, judged in float32",
    "stronger": "Something else in place of a word of one vector, with the defaults and the same number of passes",
    "ablations": "The defaults with new examples in every step, unless 256 are named, and one more thing changed",
}


def scale_of(rows: Sequence[Row]) -> words_curves.Scale:
    """Return the held-out loss of each subject where the gain is 0, and that where it is 1.

    It is 0 at the start and 1 for the mean of the subject's runs of the best gradient arm. The best one is that with the
    lowest mean loss over seeds and subjects, of those that were run on all of them, so it is the same for all.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["group"] == "gradient":
            losses.setdefault(row["arm"], {}).setdefault(row["subject"], []).append(row["loss"])
    means = {arm: {s: statistics.fmean(each) for s, each in own.items()} for arm, own in losses.items()}
    subjects = {subject for own in means.values() for subject in own}
    complete = [own for own in means.values() if own.keys() == subjects]
    if not complete:
        return {}
    best = min(complete, key=lambda own: sum(own.values()))
    start = {row["subject"]: row["loss"] for row in rows if row["group"] == "start"}
    return {subject: (start[subject], best[subject]) for subject in start if subject in best}


def gain_of(row: Row, scale: words_curves.Scale) -> float:
    """Return the gain of a row whose subject is on the scale."""
    nothing, all_ = scale[row["subject"]]
    return (nothing - row["loss"]) / (nothing - all_)


def formats(rows: Sequence[Row]) -> list[str]:
    """Return the table of weight formats: how well slopes agree, and what Train Word makes of it."""
    own = [row for row in rows if row["group"] == "formats"]
    if not own:
        return []
    head = ["format", *(f"slopes agree at {mu}" for mu in own[0]["agreement"]), "perturbation used"]
    lines = ["## Weight formats (toby; 0.2 is asked for)", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in own:
        cells = [row["format"], *(f"{value:.2f}" for value in row["agreement"].values()), _used(row["agreement"])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _used(agreement: dict[str, float]) -> str:
    """Return the verdict of ``zoodip/signal.py``."""
    best = max(agreement, key=lambda mu: agreement[mu])
    if agreement[best] < 0.7:
        return "refused"
    return "0.2" if agreement["0.2"] >= 0.9 else best


def memory(rows: Sequence[Row]) -> list[str]:
    """Return the tables of memory: counted without weights, and on an emulated card."""
    lines: list[str] = []
    if counted := [row for row in rows if row["group"] == "memory"]:
        lines += [
            "## Memory, counted", "",
            "GiB of live tensors in one step of the real loop, at full size, without weights and without the allocator's and "
            "kernels' own memory. Wanted: the paper's 2.37 GB for SD1.5 in int8, 5 GB for SDXL in int8, for FLUX.1 the "
            "model's own weights and 1 GiB. FLUX.1's text encoders are in fp8.", "",
            "| model | px | weights | words at once | text encoders | model | encoding | a forward pass | together | in turns | wanted |",
            "|---" * 11 + "|",
        ]  # fmt: skip
        lines += [_counted(row) for row in counted] + [""]
    if run := [row for row in rows if row["group"] == "card"]:
        lines += [
            "## Memory, emulated", "",
            "The node on an emulated card whose tensors have shapes but no data, through ComfyUI's own memory management; FLUX.1-dev's T5 "
            "is in fp8. int8 and 4-bit run in ComfyUI's plain operations, whose intermediate results a card's kernels do not keep; fused: without "
            "them. Highest: most GiB on the card. Rows: of the model's calls, as ComfyUI splits them.", "",
            "| model | weights | px | directions | residency | card | highest | wanted | rows | the node said |", "|---" * 10 + "|",
        ]  # fmt: skip
        limits = {(row["model"], row["side"], row["format"]): _gib(row["limit"]) for row in counted}
        lines += [
            f"| {row['model']} | {row['weights']}{', fused' * row['fused']} | {row['side']} | {row['directions']} | {row['residency']} | {row['card']:g} GiB | "
            f"{_gib(row['peak'])} | {limits.get((row['model'], row['side'], row['weights']), '')} | "
            f"{', '.join(map(str, row['rows_of_calls']))} | {row['told']} |"
            for row in run
        ] + [""]
    return lines


def _counted(row: Row) -> str:
    weights = "fp16" if row["format"] == "off" else row["format"]
    names = ("text_weights", "model_weights", "text_peak", "model_peak", "together", "in_turns")
    cells = [row["model"], str(row["side"]), weights, str(row["rows"]), *(_gib(row[name]) for name in names)]
    return f"| {' | '.join(cells)} | {_gib(row['limit']) if row['format'] != 'off' else ''} |"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Return the table, group by group; subjects without a gradient arm are left out."""
    scale = scale_of([row for row in rows if row["group"] in GROUPS])
    rows = [row for row in rows if row["group"] in GROUPS and row["subject"] in scale]
    head = [
        "arm", "forward passes", *(f"gain, {subject}" for subject in sorted(scale)), "gain", "cosine",
        "gained per 1,000 passes", "recognised", "s",
    ]  # fmt: skip
    lines: list[str] = []
    for group, title in GROUPS.items():
        own = [row for row in rows if row["group"] == group]
        if not own:
            continue
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm in dict.fromkeys(row["arm"] for row in own):
            lines.append(_line(arm, [row for row in own if row["arm"] == arm], scale, _first_cosines(rows)))
        lines.append("")
    return lines


def _first_cosines(rows: Sequence[Row]) -> dict[str, float]:
    return {row["subject"]: row["cosine"] for row in rows if row["group"] == "start"}


def _line(arm: str, rows: Sequence[Row], scale: words_curves.Scale, first: dict[str, float]) -> str:
    cells = [arm, f"{rows[0]['forwards']:,}"]
    for subject in sorted(scale):
        values = [gain_of(row, scale) for row in rows if row["subject"] == subject]
        cells.append(" ".join(f"{value:.2f}" for value in values) or "-")
    cells.append(f"**{statistics.fmean(gain_of(row, scale) for row in rows):.2f}**")
    cells.append(f"{statistics.fmean(row['cosine'] for row in rows):.2f}")
    gained = statistics.fmean(row["cosine"] - first[row["subject"]] for row in rows)
    cells.append(f"{1000 * gained / rows[0]['forwards']:.3f}" if rows[0]["forwards"] else "")
    cells.append(f"{statistics.fmean(row['recognised'] for row in rows):.2f}")
    timed = [row["seconds"] for row in rows if "curve" in row]
    cells.append(f"{statistics.fmean(timed):.0f}" if timed else "-")
    return f"| {' | '.join(cells)} |"


def write_report(path: Path, rows: Sequence[Row]) -> None:
    """Write the tables with date and machine, and the plot beside them."""
    runs = [row for row in rows if row["group"] in GROUPS]
    scale = scale_of(runs)
    text = [
        "# Words learned from forward passes", "", command_line.about(), "",
        "Gain: share of what the best gradient arm gains in held-out loss over the word at the start; one number per seed, and "
        "the mean. Cosine and recognised: four sampled pictures each, seen by the world's reader. s: seconds of one core.", "",
        *table(rows), *words_curves.table(runs, scale), *formats(rows), *memory(rows),
    ]  # fmt: skip
    path.write_text("\n".join(text), encoding="utf-8")
    if words_curves.curves(runs, scale):
        words_curves.plot(runs, scale, path.with_suffix(".png"))

"""The table of the benchmark ``words``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line

Row = dict[str, Any]
GROUPS = {
    "start": "Before training",
    "gradient": "Gradient textual inversion, for comparison (a backward pass for each forward pass in addition)",
    "paper": "ZOODiP with the paper's settings, and without its parts",
    "defaults": "This package's defaults",
    "ablations": "New examples in every step, and one more thing changed",
}
FIXED_FORWARDS = 1440


def gains(rows: Sequence[Row]) -> dict[tuple[str, str, int], float]:
    """Return the gain of every row by (subject, arm, seed): 0 at the start, 1 for the subject's best gradient arm.

    The best one is that with the lowest mean loss over seeds and subjects, so it is the same arm for all.
    """
    start = {row["subject"]: row["loss"] for row in rows if row["group"] == "start"}
    by_gradient: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["group"] == "gradient":
            by_gradient.setdefault(row["arm"], {}).setdefault(row["subject"], []).append(row["loss"])
    means = {
        arm: {s: statistics.fmean(losses) for s, losses in by_subject.items()}
        for arm, by_subject in by_gradient.items()
    }
    complete = [arm for arm in means if means[arm].keys() == start.keys()]
    if not complete:
        return {}
    best = means[min(complete, key=lambda arm: sum(means[arm].values()))]
    return {
        (row["subject"], row["arm"], row["seed"]): (start[row["subject"]] - row["loss"])
        / (start[row["subject"]] - best[row["subject"]])
        for row in rows
    }


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
            "The node on an emulated card whose tensors have shapes but no data, through ComfyUI's own memory management; SD1.5 in "
            "fp16, FLUX.1-dev and its T5 in fp8. Highest: most GiB of tensors alive on the card. Rows: of the model's calls, as "
            "ComfyUI splits them.", "",
            "| model | px | directions | residency | card | highest | rows | the node said |", "|---" * 8 + "|",
        ]  # fmt: skip
        lines += [
            f"| {row['model']} | {row['side']} | {row['directions']} | {row['residency']} | {row['card']:g} GiB | "
            f"{_gib(row['peak'])} | {', '.join(map(str, row['rows_of_calls']))} | {row['told']} |"
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
    """Return the table, group by group."""
    rows = [row for row in rows if row["group"] in GROUPS]
    found, subjects = gains(rows), sorted({row["subject"] for row in rows})
    head = ["arm", "forward passes", *(f"gain, {subject}" for subject in subjects), "gain", "cosine", "recognised", "s"]
    lines: list[str] = []
    for group, title in GROUPS.items():
        own = [row for row in rows if row["group"] == group]
        if not own:
            continue
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm in dict.fromkeys(row["arm"] for row in own):
            lines.append(_line(arm, [row for row in own if row["arm"] == arm], subjects, found))
        lines.append("")
    return lines


def _line(arm: str, rows: Sequence[Row], subjects: Sequence[str], found: dict[tuple[str, str, int], float]) -> str:
    by_subject = {s: [found.get((s, arm, row["seed"]), 0.0) for row in rows if row["subject"] == s] for s in subjects}
    cells = [arm, f"{rows[0]['forwards']:,}"]
    cells += [" ".join(f"{gain:.2f}" for gain in by_subject[s]) or "-" for s in subjects]
    every = [gain for values in by_subject.values() for gain in values]
    cells.append(f"**{statistics.fmean(every):.2f}**")
    cells += [f"{statistics.fmean(row[name] for row in rows):.2f}" for name in ("cosine", "recognised")]
    cells.append(f"{statistics.fmean(row['seconds'] for row in rows):.0f}")
    return f"| {' | '.join(cells)} |"


def write_report(path: Path, rows: Sequence[Row]) -> None:
    """Write the table with date and machine."""
    text = [
        "# Words learned from forward passes", "", command_line.about(), "",
        "Gain: share of what the best gradient arm gains in held-out loss over the word at the start; one number per seed, and "
        "the mean. Cosine and recognised: four sampled pictures each, seen by the world's reader. s: of a shared machine.", "",
        *table(rows), *formats(rows), *memory(rows),
    ]  # fmt: skip
    path.write_text("\n".join(text), encoding="utf-8")

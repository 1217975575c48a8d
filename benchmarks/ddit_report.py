"""The table of ``ddit.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``ddit.md``."""
    lines = ["# Dynamic patches (DDiT)", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        kind = part.split(",")[0]
        lines += [f"## {part[0].upper()}{part[1:]}", "", *_TABLES[kind](own), "", own[0]["about"], ""]
    (folder / "ddit.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def operations(rows: list[dict[str, Any]]) -> list[str]:
    """Return the counts, model by model."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [
            f"{model}, {own[0]['size']}, {own[0]['text_tokens']} text tokens, counted; the adapter's own products included. Call by "
            "call: of the coarse call that sampling makes, at full size; otherwise by the number of tokens.", "",
            "| | Tokens | 10^12 operations | Fewer | Call by call |", "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        lines += [
            f"| {row['what']} | {row['tokens']} | {row['operations'] / 1e12:.2f} | 1/{row['ratio']:.2f} | "
            f"1/{row['call_by_call']:.2f} |"
            for row in own
            if "tokens" in row
        ]
        lines += ["", *(f"* {row['what']}: {row['steps']:.1f}." for row in own if "steps" in row), ""]
    return lines[:-1]


def seconds(rows: list[dict[str, Any]]) -> list[str]:
    """Return measured and counted ratios."""
    lines = [
        f"Processor time of one sampled step, median of {rows[0]['repeats']}, all patch sizes in turns, with adapters, without "
        f"guidance; random weights in float32, {rows[0]['text_tokens']} text tokens, {rows[0]['threads']} thread.", "",
        "| Model | Size | Patches | Tokens | Seconds | Measured | Counted |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        patches = "own" if row["scale"] == 1 else f"{row['scale']}x"
        lines.append(
            f"| {row['model']} | {row['size']} | {patches} | {row['tokens']} | {row['seconds']:.2f} | 1/{row['measured']:.2f} | "
            f"1/{row['counted']:.2f} |"
        )
    return lines


def training(rows: list[dict[str, Any]]) -> list[str]:
    """Return the errors by noise level."""
    lines = [
        "Relative error of the velocity on held-out prompts, from low to high noise (0.05 to 0.95).", "",
        "| Patches | Coarse call | Mean | By noise level |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        for name in ("untrained", "start", "trained"):
            errors = row[name]
            levels = ", ".join(f"{error:.2f}" for error in errors)
            label = {"untrained": "training-free", "start": "with the connection, before training"}.get(
                name, f"after {row['best_step']} of {row['steps']} steps"
            )
            lines.append(f"| {row['scale']}x | {label} | {sum(errors) / len(errors):.3f} | {levels} |")
    return lines


def pictures(rows: list[dict[str, Any]]) -> list[str]:
    """Return all arms, sorted by operations."""
    lines = [
        "Operations are counted, in plain steps. Likeness to the prompt's drawing and right answers: by the demo's reader. "
        f"Difference: root mean square of pixels from plain {rows[0]['steps']} steps with the same seeds; "
        f"{rows[0]['prompts']} prompts.", "",
        "| Arm | Steps | Operations | Likeness | Right | Difference | Patches |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["plain_steps"], row["name"] != "plain")):
        difference = "" if row["from_full"] is None else f"{row['from_full']:.3f}"
        scales = "" if set(row["scales"]) == {"1"} else f"`{row['scales']}`"
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['plain_steps']:.2f} | {row['likeness']:.3f} "
            f"(± {row['likeness_error']:.3f}) | {row['right']:.3f} | {difference} | {scales} |"
        )
    return lines


def clips(rows: list[dict[str, Any]]) -> list[str]:
    """Return how near to many plain steps coarse steps and fewer plain steps come, sorted by operations."""
    lines = [
        f"{rows[0]['clips']} clips of prompts that were not trained on, guidance 3. Difference of the final latents from "
        f"{rows[0]['name']} with the same noise, relative to these, and that of plain steps at equal operations, interpolated "
        "between whole ones; mean of the clips, with its standard error. Moves: the share of clips whose shape moves in the "
        "prompt's direction.", "",
        "| Way | Operations | Difference | Of plain there | More than plain | Moves | Patches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row["plain_steps"]):
        plain = plain_at(rows, row["plain_steps"])
        more, scales = np.subtract(row["difference_each"], plain), f"`{row['scales']}`"
        is_plain = set(row["scales"]) == {"1"}
        lines.append(
            f"| {row['name']} | {row['plain_steps']:.2f} | {_mean(row['difference_each'])} | {_mean(plain)} | "
            f"{'' if is_plain else _mean(more, '+')} | {row['moves']:.2f} | {'' if is_plain else scales} |"
        )
    return lines


def plain_at(rows: list[dict[str, Any]], operations: float) -> np.ndarray:
    """Return the differences, clip by clip, of plain steps with so many operations, interpolated between whole steps."""
    plain = sorted((row for row in rows if set(row["scales"]) == {"1"}), key=lambda row: row["plain_steps"])
    steps, each = [row["plain_steps"] for row in plain], np.array([row["difference_each"] for row in plain])
    return np.array([np.interp(operations, steps, clip) for clip in each.T])


def _mean(values: Any, sign: str = "") -> str:
    values = np.asarray(values)
    return f"{values.mean():{sign}.3f} (± {values.std(ddof=1) / len(values) ** 0.5:.3f})"


def clip_model(rows: list[dict[str, Any]]) -> list[str]:
    """Return how the small Wan was trained."""
    (row,) = rows
    return [
        f"A Wan 2.1 of ComfyUI's own class with {row['weights']:,} weights, {row['tokens']} image tokens for a clip of "
        f"{row['frames']} frames of {row['side']} px; {row['steps']} steps from scratch, batch {row['batch']}, new drawings in "
        f"every step, {row['seconds']} processor seconds. Mean square error of the velocity over the last 50 steps: "
        f"{row['loss']:.3f}."
    ]  # fmt: skip


def levels(rows: list[dict[str, Any]]) -> list[str]:
    """Return the errors of adapters that were trained on all levels and on those of coarse steps, at the latter."""
    lines = [
        f"Relative error of the velocity with patches of 2x at the noise levels of the coarse steps, on {rows[0]['unseen']} unseen "
        f"prompts, of two trainings on {rows[0]['prompts']} prompts with the same seeds and {rows[0]['steps']} steps each: on all "
        "levels, and on these alone. Mean over the prompts; of the difference with its standard error.", "",
        "| Coarse steps | Levels | On all | On these | Difference | Better on |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        everywhere, there = (np.array(row[arm]).mean(1) for arm in ("everywhere", "there"))
        lines.append(
            f"| {row['name']} | {row['levels'][0]:.2f} to {row['levels'][-1]:.2f} | {everywhere.mean():.4f} | {there.mean():.4f} | "
            f"{(there - everywhere).mean():+.4f} (± {(there - everywhere).std(ddof=1) / len(there) ** 0.5:.4f}) | "
            f"{(there < everywhere).sum()} of {len(there)} |"
        )
    return lines


_TABLES = {
    "operations": operations, "seconds": seconds, "training": training, "pictures": pictures, "the small Wan": clip_model,
    "clips": clips, "levels": levels,
}  # fmt: skip

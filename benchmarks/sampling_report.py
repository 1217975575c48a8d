"""The tables of ``sampling.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(rows: list[Row], folder: Path) -> None:
    """Write ``sampling.md``."""
    lines = ["# All ways to sample with fewer operations", ""]
    for part, (title, table) in _PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            lines += [f"## {title}", "", *table(own), "", own[0]["about"], ""]
    (folder / "sampling.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def counted(rows: list[Row]) -> list[str]:
    """Return what every way costs in plain steps, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    costs = {(row["model"], row["name"]): row["plain_steps"] for row in rows}
    sizes = {row["model"]: f"{row['model']}, {row['size']}" for row in rows}
    lines = [
        f"Operations in plain steps of the same model, counted at full size with {rows[0]['text_tokens']} text tokens. Calls that "
        "EasyCache spares: as on the demo's world. RALU's presets are published for FLUX.1-dev only, and it makes single "
        "pictures.", "",
        f"| Way | {' | '.join(sizes[model] for model in models)} |", "|---" * (len(models) + 1) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [f"{costs[model, name]:.1f}" if (model, name) in costs else "" for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def training(rows: list[Row]) -> list[str]:
    """Return how DDiT's adapters were trained."""
    (row,) = rows
    errors = {name: sum(row[name]) / len(row[name]) for name in ("untrained", "start", "trained")}
    return [
        f"Patches of {row['scale']}x, {row['side']} px, {row['latents']} latents of {row['prompts']} prompts, the best of "
        f"{row['steps']} steps (step {row['best_step']}). Relative error of the velocity on held-out prompts: "
        f"{errors['untrained']:.3f} without training, {errors['start']:.3f} with the connection, {errors['trained']:.3f} trained."
    ]


def pictures(rows: list[Row]) -> list[str]:
    """Return every way's pictures, by operations."""
    full = rows[0]
    lines = [
        f"256 px, {full['prompts']} prompts, guidance 4. Operations in plain steps: of the calls that were made. Likeness to the "
        "prompt's drawing and right answers: by the demo's reader. Difference: root mean square of pixels from "
        f"{full['name']} with the same seeds.", "",
        "| Way | Operations | Likeness | Right | Difference |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {row['name']} | {row['plain_steps']:.2f} | {row['likeness']:.3f} (± {row['likeness_error']:.3f}) | "
        f"{row['right']:.3f} | {row['from_full']:.3f} |"
        for row in sorted(rows, key=lambda row: -row["plain_steps"])
    ]
    return lines


_PARTS = {
    "counted": ("Counted at full size", counted), "pictures": ("Pictures of the demo's world", pictures),
    "training": ("The adapters", training),
}  # fmt: skip

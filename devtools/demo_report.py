"""Writes the demo's results: the LoRA, the pictures of the titled nodes, and a table of numbers."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_client import Json, node_titled
from PIL import Image, ImageDraw, ImageFont

PICTURES = {
    "Selection heatmap": "selection_heatmap.png",
    "Training patches": "training_patches.png",
    "Loss plot": "loss_plot.png",
}
BEFORE, AFTER = "Before", "After"
PAPER, INK = (250, 250, 248), (30, 30, 34)
GAP = 12
MIB = 2**20


def write(
    folder: Path,
    prompt: Mapping[str, Json],
    outputs: Mapping[str, Json],
    view: Callable[[Json], bytes],
    loras: Sequence[Path],
    summary: Mapping[str, Any],
    shown: Path | None = None,
) -> None:
    """Fill `folder`; `view` fetches the picture behind an image reference of `outputs`.

    `shown` is the folder of the training pictures, which are placed above the samples.
    """

    def images(title: str) -> list[Image.Image]:
        references = outputs.get(node_titled(prompt, title), {}).get("images", [])
        if not references:
            raise LookupError(f"The node {title!r} showed no picture.")
        return [Image.open(io.BytesIO(view(reference))).convert("RGB") for reference in references]

    if not loras:
        raise LookupError("The workflow saved no LoRA.")
    for lora in loras:
        shutil.copy2(lora, folder)
    for title, name in PICTURES.items():
        sheet(images(title)).save(folder / name)
    rows = [("Training pictures", [opened(path) for path in sorted(shown.glob("*.png"))])] if shown else []
    for number in range(1, 1 + sum(titles_like(prompt, BEFORE))):
        suffix = "" if number == 1 else f" {number}"
        text = caption(prompt, node_titled(prompt, BEFORE + suffix))
        rows.append((f"{text}: before and after", [*images(BEFORE + suffix), *images(AFTER + suffix)]))
    comparison(rows).save(folder / "before_after.png")
    (folder / "summary.md").write_text(table(summary), encoding="utf-8")


def titles_like(prompt: Mapping[str, Json], title: str) -> list[bool]:
    """For every node, whether its title is the given one, with or without a number."""
    titles = [node.get("_meta", {}).get("title", "") for node in prompt.values()]
    return [name == title or (name.startswith(title + " ") and name[len(title) + 1 :].isdigit()) for name in titles]


def opened(path: Path, side: int = 128) -> Image.Image:
    """A picture file, small enough to be placed beside others."""
    with Image.open(path) as picture:
        return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def caption(prompt: Mapping[str, Json], node: str) -> str:
    """The text that a picture was sampled from: the nearest one upstream, positive inputs first."""
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop(0)
        if current in seen or current not in prompt:
            continue
        seen.add(current)
        inputs = prompt[current]["inputs"]
        texts = [inputs[name] for name in ("text", "prompt") if isinstance(inputs.get(name), str)]
        if texts:
            return texts[0]
        links = [name for name, value in inputs.items() if isinstance(value, list) and len(value) == 2]
        waiting += [inputs[name][0] for name in sorted(links, key=lambda name: (name != "positive", name))]
    return ""


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures in a grid; a single picture unchanged."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    return stacked([beside(row) for row in rows])


def comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures, each under its label."""
    bands = [beside(images) for _, images in rows]
    width = max(band.width for band in bands)
    labels = [label_band(text, width) for text, _ in rows]
    return stacked([part for pair in zip(labels, bands, strict=True) for part in pair])


def label_band(text: str, width: int) -> Image.Image:
    """`text` in a strip as wide as the text, but at least `width`."""
    font = ImageFont.load_default(size=max(14, min(24, width // 24)))
    _, _, right, bottom = font.getbbox(text)
    strip = Image.new("RGB", (max(width, math.ceil(right)), math.ceil(bottom) + 4), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, fill=INK, font=font)
    return strip


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures in a row."""
    size = (sum(image.width + GAP for image in images) - GAP, max(image.height for image in images))
    row, left = Image.new("RGB", size, PAPER), 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + GAP
    return row


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures in a column, with a margin around."""
    size = (max(image.width for image in images) + 2 * GAP, sum(image.height + GAP for image in images) + GAP)
    column, top = Image.new("RGB", size, PAPER), GAP
    for image in images:
        column.paste(image, (GAP, top))
        top += image.height + GAP
    return column


def table(summary: Mapping[str, Any]) -> str:
    """The numbers of a run, without nested values, as a Markdown table that is also readable as plain text."""
    rows = [(label(name), spelled(name, value)) for name, value in summary.items() if spelled(name, value)]
    wide = max((len(name) for name, _ in rows), default=0)
    high = max((len(text) for _, text in rows), default=0)
    lines = [f"| {name:<{wide}} | {text:>{high}} |" for name, text in [("", ""), *rows]]
    lines.insert(1, f"|{'-' * (wide + 2)}|{'-' * (high + 1)}:|")
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """``peak_memory_bytes`` as "Peak memory"."""
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ").capitalize()


def spelled(name: str, value: Any) -> str:
    """A value with its unit, which its name ends or begins with; empty if it does not fit in a cell."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and name.endswith("_bytes"):
        return f"{value / MIB:,.1f} MiB"
    if isinstance(value, (int, float)) and (name.endswith("_seconds") or name.startswith("seconds_")):
        return f"{value:,.3g} s" if value < 100 else f"{value:,.0f} s"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)) and all(isinstance(part, (int, str)) for part in value):
        value = ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) and len(value) <= 60 else ""

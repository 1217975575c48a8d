"""Draws a template's thumbnail: its purpose, in text that is readable in the template browser, and its graph.

The browser shows square thumbnails about 220 px wide. At that size, pictures of graphs alone all look the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from workflow_graphs import Graph

PICTURES = Path(__file__).resolve().parents[1] / "web" / "docs" / "img"
SIDE, MARGIN, LOWER = 720, 40, 330  # px; LOWER: the top of the graph or other picture
GROUND, HEAD, SAID = (24, 27, 33), (240, 242, 246), (176, 182, 194)
FRONT, TRAINED = (240, 150, 60), (64, 142, 226)  # these and the next: as in the heatmap of Select Blocks
FROZEN, BACK = (160, 196, 226), (152, 110, 214)
ACCENTS = {  # a colour for each badge; a card and its Resume have the same hue
    "CPU": (92, 98, 112), "1": (196, 74, 110), "6 GB": (120, 130, 40), "8 GB": (46, 125, 90), "12 GB": (38, 98, 168), "16 GB": (30, 130, 150), "24 GB": (120, 74, 170),
    "Z-Image": (150, 88, 40), "Qwen-Image": (70, 70, 160), "Qwen 2.1": (36, 96, 190), "Krea": (40, 120, 130), "FLUX.1": (150, 104, 30), "FLUX.2": (140, 50, 60),
    "Edit": (110, 60, 140), "Wan": (100, 110, 30), "LTX-2": (60, 90, 60), "DDiT": (176, 120, 36), "MiniMax": (150, 60, 110), "+ 8 GB": (30, 84, 60),
    "+ 12 GB": (26, 66, 114), "+ 24 GB": (80, 50, 114),
}  # fmt: skip
FLUX_BLOCKS = 57
PAPER, OURS = (19, 10), (14, 29)  # the first and the last blocks with a ratio of 0.5: *preset*, and *skip and freeze*


def draw(graph: Graph, screenshot: Path) -> Image.Image:
    """Return the thumbnail of a graph: its text, and below it the screenshot or a picture that the graph names."""
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(image)
    _write(pen, graph.headline, 36, 76, HEAD)
    for place, line in enumerate(graph.subline.split("\n")):
        _write(pen, line, 134 + 46 * place, 38, SAID)
    blocks = graph.prompt.get("select", {}).get("inputs", {})
    if spans := _of_flux(blocks):
        exact = graph.prompt.get("residuals", {}).get("inputs", {}).get("back_residual") == "exact"
        _draw_blocks(pen, *spans, is_frozen=exact)
    if graph.badge:
        _draw_badge(pen, graph.badge)
        return image
    shown = _parts(*graph.shows) if graph.shows else Image.open(screenshot).convert("RGB")
    width, height = SIDE - 2 * MARGIN, SIDE - LOWER - MARGIN
    scale = min(width / shown.width, height / shown.height)
    shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.LANCZOS)
    image.paste(shown, ((SIDE - shown.width) // 2, LOWER + (height - shown.height) // 2))
    return image


def _of_flux(blocks: dict[str, Any]) -> tuple[int, int] | None:
    """Return how many of FLUX.1's first and last blocks are skipped or frozen, or None of another model."""
    if blocks.get("method") == "manual":
        return blocks["front"], blocks["back"]
    if blocks.get("front") != PAPER[0]:
        return None
    return {"preset": PAPER, "skip and freeze": OURS}.get(blocks["method"])


def _parts(name: str, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Return parts of one height of a help picture, side by side."""
    parts = [Image.open(PICTURES / name).convert("RGB").crop(box) for box in boxes]
    left, gap = 0, 16
    row = Image.new("RGB", (sum(part.width + gap for part in parts) - gap, parts[0].height), GROUND)
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width + gap
    return row


def _draw_badge(pen: ImageDraw.ImageDraw, badge: str) -> None:
    """Fill the lower part with a coloured field and a few large letters."""
    colour = ACCENTS[badge]
    pen.rounded_rectangle((MARGIN, LOWER, SIDE - MARGIN, SIDE - MARGIN), 28, fill=colour)
    size = 220
    while pen.textlength(badge, ImageFont.load_default(size)) > SIDE - 4 * MARGIN:
        size -= 4
    middle = (SIDE // 2, (LOWER + SIDE - MARGIN) // 2)
    pen.text(middle, badge, fill=HEAD, font=ImageFont.load_default(size), anchor="mm")


def _write(pen: ImageDraw.ImageDraw, words: str, top: int, size: int, colour: tuple[int, int, int]) -> None:
    """Write a line, in smaller letters if it would be too long."""
    while pen.textlength(words, ImageFont.load_default(size)) > SIDE - 2 * MARGIN:
        size -= 1
    pen.text((MARGIN, top), words, fill=colour, font=ImageFont.load_default(size))


def _draw_blocks(pen: ImageDraw.ImageDraw, front: int, back: int, is_frozen: bool) -> None:
    """Draw FLUX.1's blocks in a row: filled if they run, outlined if skipped."""
    pitch = (SIDE - 2 * MARGIN) / FLUX_BLOCKS
    for block in range(FLUX_BLOCKS):
        left = MARGIN + block * pitch
        is_back = block >= FLUX_BLOCKS - back
        kept = front <= block and (is_frozen or not is_back)
        colour = FRONT if block < front else TRAINED if not is_back else FROZEN if is_frozen else BACK
        box = (left, 242 if kept else 250, left + pitch - 3, 306 if kept else 298)
        pen.rectangle(box, fill=colour if kept else None, outline=colour, width=2)

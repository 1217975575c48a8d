"""Draws the pack's icon: ``python devtools/make_icon.py`` writes ``icon.png``, 400 px square.

Seven blocks in a row, in the colours of the heatmap of Select Blocks: two skipped blocks at the front, three trained
ones, two skipped ones at the back. A line runs through the trained blocks and jumps over the others.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIDE, SHARPNESS = 400, 4  # px; the icon is drawn this many times larger and then scaled down
GROUND, LINE = (24, 27, 33), (238, 240, 244)
FRONT, TRAINED, BACK = (240, 150, 60), (64, 142, 226), (152, 110, 214)
BLOCKS = (
    (66, FRONT),
    (105, FRONT),
    (161, TRAINED),
    (200, TRAINED),
    (239, TRAINED),
    (295, BACK),
    (334, BACK),
)  # middles
WIDTH, HEIGHT, SHORTER = 29, 150, 24  # SHORTER: skipped blocks, at both ends
HALFWAY, JUMP, THICK, DOT = 232, 132, 10, 13  # of the line
EDGE, LANDING = 36, 133  # where the line begins and lands; the other half mirrors it


def draw() -> Image.Image:
    """Return the icon with transparent corners."""
    image = Image.new("RGBA", (SIDE * SHARPNESS, SIDE * SHARPNESS))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, *(SIDE * SHARPNESS - 1,) * 2), radius=72 * SHARPNESS, fill=GROUND)
    for middle, colour in BLOCKS:
        height = HEIGHT / 2 - (0 if colour == TRAINED else SHORTER)
        fill = colour if colour == TRAINED else tuple((3 * a + b) // 4 for a, b in zip(GROUND, colour, strict=True))
        box = _box(middle, HALFWAY, WIDTH / 2, height)
        pen.rounded_rectangle(box, 8 * SHARPNESS, fill=fill, outline=colour, width=4 * SHARPNESS)
    for start, end in ((EDGE, LANDING), (SIDE - LANDING, SIDE - EDGE)):
        half = THICK / 2
        box = _box((start + end) / 2, HALFWAY, (end - start) / 2 + half, JUMP + half)
        pen.arc(box, 180, 360, fill=LINE, width=THICK * SHARPNESS)
    pen.rectangle(_box(SIDE / 2, HALFWAY, SIDE / 2 - LANDING + THICK / 2, THICK / 2), fill=LINE)
    for x in (EDGE, SIDE - EDGE):
        pen.ellipse(_box(x, HALFWAY, DOT, DOT), fill=LINE)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _box(x: float, y: float, half_width: float, half_height: float) -> list[float]:
    """The box around a point, given in px of the icon, in pixels of the drawing."""
    return [SHARPNESS * side for side in (x - half_width, y - half_height, x + half_width, y + half_height)]


if __name__ == "__main__":
    draw().save(Path(__file__).resolve().parents[1] / "icon.png", optimize=True)

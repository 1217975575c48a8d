"""Pictures of dynamic patches: the patch size of every step, and errors by noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from ..ddit.error_table import ErrorTable
from .pictures import BACKGROUND, FAINT, INK, KEPT

_WIDTH, _HEIGHT, _MARGIN = 640, 300, 44
_SHADES = (KEPT, (129, 89, 164), (238, 150, 75), (178, 24, 43))


def patch_strip(scales: Sequence[int], text: str, steps: int = 0) -> Image.Image:
    """Return a picture of a schedule: a square per step, cut into patches of the step's size, with a line of text.

    Args:
        scales: s of every step; empty if it is not known.
        text: Under the strip.
        steps: Of the whole run, if more are to come: these are outlined.
    """
    shown = max(len(scales), steps, 1)
    cell = max(10, min(40, (_WIDTH - 16) // shown))
    picture = Image.new("RGB", (max(_WIDTH, shown * cell + 16), cell + 40), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for step, scale in enumerate(scales):
        left, top = 8 + step * cell, 8
        parts = max(1, 4 // scale)
        draw.rectangle((left, top, left + cell - 3, top + cell - 3), fill=_SHADES[min(scale.bit_length() - 1, 3)])
        for part in range(1, parts):
            place = part * (cell - 3) // parts
            draw.line((left + place, top, left + place, top + cell - 3), fill=BACKGROUND)
            draw.line((left, top + place, left + cell - 3, top + place), fill=BACKGROUND)
    for left in range(8 + len(scales) * cell, 8 + steps * cell, cell):
        draw.rectangle((left, 8, left + cell - 3, 8 + cell - 3), outline=FAINT)
    draw.text((8, cell + 16), text, fill=INK)
    return picture


def error_chart(tables: Mapping[str, ErrorTable]) -> Image.Image:
    """Return a chart of errors by noise level, one line per table.

    Args:
        tables: Name -> table; at most as many as there are shades.
    """
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    top = max(max(table.errors) for table in tables.values()) * 1.1 or 1.0

    def place(sigma: float, error: float) -> tuple[float, float]:
        return _MARGIN + sigma * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - error / top * (_HEIGHT - 2 * _MARGIN)

    for share in (0.0, 0.5, 1.0):
        draw.line((*place(0.0, share * top), *place(1.0, share * top)), fill=FAINT)
        draw.text((4, place(0.0, share * top)[1] - 6), f"{share * top:.2f}", fill=INK)
        draw.text((place(share, 0.0)[0] - 8, _HEIGHT - _MARGIN + 6), f"{share:g}", fill=INK)
    draw.text((_WIDTH // 2 - 40, _HEIGHT - 18), "noise level", fill=INK)
    for number, (name, table) in enumerate(tables.items()):
        shade = _SHADES[number % len(_SHADES)]
        points = [place(sigma, error) for sigma, error in zip(table.sigmas, table.errors, strict=True)]
        draw.line([value for point in points for value in point], fill=shade, width=2)
        draw.text((_MARGIN + 4 + number % 2 * 280, 4 + number // 2 * 14), name, fill=shade)
    return picture

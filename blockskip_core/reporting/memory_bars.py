"""A run's memory as bars, phase by phase: as set, and as it will run."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping

from PIL import Image, ImageDraw

from ..units import format_bytes
from .pictures import BACKGROUND, FAINT, INK, KEPT, TOO_MUCH, drawing_font

WIDTH = 420  # px, about the width of a node
LEFT, RIGHT, BAR, GAP = 118, 72, 18, 8  # px
Peaks = Mapping[str, int]


def memory_bars(
    as_set: Peaks, as_run: Peaks | None, skipped: Collection[str], available: int, largest: int, verdict: str
) -> Image.Image:
    """Return a bar chart of peaks against the available memory.

    Args:
        as_set: Phase -> bytes with the requested settings.
        as_run: The same with the settings that the run will use; None if they are the same, or no settings fit.
        skipped: Phases that will not run; they are hatched, and never too much.
        available: Bytes that the run may use.
        largest: The largest counted peak that fits; what is between is the margin, and shaded.
        verdict: A sentence above the bars.
    """
    groups = [("as set", as_set), *([("as run", as_run)] if as_run else [])]
    lines = textwrap.wrap(verdict, 58)
    top = 20 + 17 * len(lines)
    rows = sum(len(peaks) for _, peaks in groups)
    picture = Image.new("RGB", (WIDTH, top + rows * (BAR + GAP) + 24 * len(groups) + 26), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((12, 10), "\n".join(lines), fill=INK, font=drawing_font(13))
    longest = max([available, *(peak for _, peaks in groups for peak in peaks.values())])
    margin, line = (LEFT + (WIDTH - LEFT - RIGHT) * size // longest for size in (largest, available))
    if margin < line:
        for y in range(top, picture.height - 26, 4):
            draw.line((margin, y, line, y), fill=FAINT)
    place = top
    for title, peaks in groups:
        draw.text((12, place + 2), title, fill=INK, font=drawing_font(13))
        place += 24
        for phase, peak in peaks.items():
            _bar(draw, place, phase, peak, longest, line, None if phase in skipped else peak <= largest)
            place += BAR + GAP
    draw.line((line, top, line, place), fill=INK, width=2)
    words = f"{format_bytes(available)} available"
    draw.text((min(line, WIDTH - 12), place + 4), words, fill=INK, font=drawing_font(12), anchor="ra")
    return picture


def _bar(
    draw: ImageDraw.ImageDraw, top: int, phase: str, peak: int, longest: int, line: int, enough: bool | None
) -> None:
    end = LEFT + (WIDTH - LEFT - RIGHT) * peak // longest
    draw.text((12, top + 2), phase, fill=INK, font=drawing_font(12))
    if enough is None:
        for start in range(LEFT, end, 6):
            draw.line((start, top + BAR, min(start + BAR, end), top + max(0, BAR - end + start)), fill=FAINT, width=2)
        draw.rectangle((LEFT, top, end, top + BAR), outline=FAINT)
    else:
        draw.rectangle((LEFT, top, end, top + BAR), fill=KEPT if enough else TOO_MUCH)
    words, font = "not run" if enough is None else format_bytes(peak), drawing_font(12)
    crossed = end < line < end + 8 + draw.textlength(words, font=font)
    draw.text(((line if crossed else end) + 6, top + 2), words, fill=INK, font=font)

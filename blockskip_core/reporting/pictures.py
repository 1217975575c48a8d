"""Pictures for users: the selection heatmap and the contact sheet of training crops, drawn with Pillow.

The host already has Pillow, and a plotting library is not worth a dependency for a few drawings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..selection.selection import BlockRole, BlockSelection
from ..selection.text_influence import TextInfluence, window_length
from ..units import format_bytes

BACKGROUND, INK, FAINT = (250, 250, 252), (32, 34, 40), (205, 208, 214)
FRONT, KEPT = (238, 150, 75), (62, 124, 177)  # these and the next: distinguishable in grey too
FROZEN, BACK = (168, 203, 228), (129, 89, 164)
COLOURS: dict[BlockRole, tuple[int, int, int]] = {"front": FRONT, "trained": KEPT, "frozen": FROZEN, "back": BACK}
MAX_CROPS = 64
TOO_MUCH = (178, 24, 43)
PROFILE_LOW, PROFILE_HIGH = np.array((236, 240, 245)), np.array((178, 24, 43))


def as_image(picture: Image.Image) -> Tensor:
    """Return a picture as the host's IMAGE, shape (1, H, W, 3), range [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0).unsqueeze(0)


def as_picture(image: Tensor) -> Image.Image:
    """Return one (H, W, 3) of the host's IMAGE as a picture."""
    return Image.fromarray((image.numpy() * 255.0).round().astype(np.uint8))


def evenly(count: int, limit: int = MAX_CROPS) -> list[int]:
    """Return at most ``limit`` of ``count`` indices, spread evenly, first and last included."""
    if count <= limit:
        return list(range(count))
    return [round(place * (count - 1) / (limit - 1)) for place in range(limit)]


def contact_sheet(
    crops: Sequence[Tensor], labels: Sequence[str], marked: Collection[int] = (), *, cell: int = 160
) -> Image.Image:
    """Return crops, each (H, W, 3), in a grid in the given order, with labels underneath.

    Those at the positions in ``marked`` are crossed out, because something is wrong with their picture.
    """
    columns = min(8, len(crops))
    rows = -(-len(crops) // columns)
    gap, line = 8, 22
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for place, (crop, label) in enumerate(zip(crops, labels, strict=True)):
        left = gap + place % columns * (cell + gap)
        top = gap + place // columns * (cell + line + gap)
        picture = as_picture(crop)
        width, height = (max(1, round(side * cell / max(picture.size))) for side in picture.size)
        place_in_cell = (left + (cell - width) // 2, top + (cell - height) // 2)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place_in_cell)
        draw.text((left + 2, top + cell + 4), label, fill=TOO_MUCH if place in marked else INK, font=drawing_font(13))
        if place in marked:
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=TOO_MUCH, width=4)
            draw.line((left, top, left + cell - 1, top + cell - 1), fill=TOO_MUCH, width=4)
    return sheet


def selection_heatmap(
    selection: BlockSelection, influence: TextInfluence | None, block_names: Sequence[str]
) -> Image.Image:
    """Return a picture of the model's blocks in order, which are skipped, and the measured influence of the text."""
    cell = max(12, min(48, 1100 // selection.num_blocks))
    left, width = 230, cell * selection.num_blocks
    rows = _profiles(influence)
    height = 150 + 54 * len(rows) + 70
    picture = Image.new("RGB", (left + width + 40, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((20, 14), _title(selection), fill=INK, font=drawing_font(18))
    draw.text((20, 40), _bytes_line(selection), fill=INK, font=drawing_font(14))
    _draw_blocks(draw, selection, block_names, left, 72, cell)
    for number, (label, values) in enumerate(rows):
        _draw_profile(draw, label, values, (left, 142 + 54 * number), cell)
    note = textwrap.fill(selection.note, max(60, (left + width) // 8))
    draw.multiline_text((20, height - 42), note, fill=INK, font=drawing_font(13))
    return picture


def _title(selection: BlockSelection) -> str:
    """Return the heading, which names the spans in order."""
    ends = ["frozen"] * bool(selection.frozen) + ["skipped at the back"] * _names_back(selection)
    return f"Blocks: skipped at the front, trained, {', '.join(ends)}"


def _names_back(selection: BlockSelection) -> bool:
    """Return whether skipped blocks at the back are worth naming: not if frozen ones stand in their place."""
    return bool(selection.back or not selection.frozen)


def _bytes_line(selection: BlockSelection) -> str:
    back = f"{selection.back} before the last {selection.tail}" if selection.tail else f"last {selection.back}"
    ends = [f"first {selection.front}", *([back] if _names_back(selection) else [])]
    counts = f"{', '.join(ends)} of {selection.num_blocks} skipped"
    if selection.frozen:
        counts += f", {selection.frozen} frozen"
    if not selection.block_bytes:
        return counts
    return (
        f"{counts}; weights kept {format_bytes(selection.kept_bytes)}, left out {format_bytes(selection.skipped_bytes)}"
    )


def _profiles(influence: TextInfluence | None) -> list[tuple[str, dict[int, float]]]:
    """Return (label, block -> distance) for each measurement; a window is drawn at its middle block."""
    if influence is None:
        return []
    count = influence.num_blocks
    front = {n - 1: value for n, value in influence.front.items() if n}
    back = {count - m: value for m, value in influence.back.items() if m}
    rows = [("first n masked", front), ("last m masked", back)]
    if influence.window:
        length = window_length(count)
        middles = {start + (length - 1) // 2: value for start, value in influence.window.items()}
        rows.append((f"window of {length} masked", middles))
    return rows


def _draw_blocks(
    draw: ImageDraw.ImageDraw, selection: BlockSelection, names: Sequence[str], left: int, top: int, cell: int
) -> None:
    draw.text((20, top + 10), f"{selection.family} blocks", fill=INK, font=drawing_font(14))
    for index in range(selection.num_blocks):
        colour = COLOURS[selection.role_of(index)]
        x = left + index * cell
        draw.rectangle((x + 1, top, x + cell - 2, top + 34), fill=colour)
        if index == 0 or names[index].split(".")[0] != names[index - 1].split(".")[0]:
            draw.line((x, top - 4, x, top + 42), fill=INK, width=2)
            draw.text((x + 4, top + 38), names[index].split(".")[0].replace("_", " "), fill=INK, font=drawing_font(12))


def _draw_profile(
    draw: ImageDraw.ImageDraw, label: str, values: dict[int, float], corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    highest = max([*values.values(), 1e-12])
    draw.text((20, top + 6), label, fill=INK, font=drawing_font(14))
    draw.text((20, top + 24), f"largest distance {highest:.3g}", fill=INK, font=drawing_font(11))
    for index, value in values.items():
        share = min(1.0, max(0.0, value / highest))
        colour = tuple(int(c) for c in PROFILE_LOW + share * (PROFILE_HIGH - PROFILE_LOW))
        x = left + index * cell
        draw.rectangle((x + 1, top, x + cell - 2, top + 40), fill=colour, outline=FAINT)


def drawing_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)

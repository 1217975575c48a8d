"""Which way of training fits which card, from the counted rows: the best by the demo's world first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory_arms import DEFAULT, EXACT

Row = dict[str, Any]
CROP, GIB = 256, 2**30
HALVES = ("half skipped", "50% skipped")  # of the families, and of FLUX.1


@dataclass(frozen=True)
class Choice:
    """A way to train, in a format that the model is loaded in.

    Attributes:
        weights: The format.
        names: Its rows' names.
        label: How the table calls it.
    """

    weights: str
    names: tuple[str, ...]
    label: str


CHOICES = (
    Choice("bf16", (DEFAULT,), "default, bf16"), Choice("fp8", (DEFAULT,), "default, fp8"),
    Choice("4-bit", (DEFAULT,), "default, 4-bit"), Choice("4-bit", (EXACT,), "*preset*, 4-bit"),
    Choice("4-bit", HALVES, "*preset*, constant, 4-bit"),
)  # fmt: skip
"""Best first: in the small world the default has R 0.957, and 0.949 with all blocks in 4-bit, corrected; *preset* 0.72 with frozen
blocks in 4-bit, and 0.51 with the paper's constant."""


def choices(rows: Sequence[Row]) -> list[str]:
    """Return a table: the first of :data:`CHOICES` that fits each card, a line per model of which all are counted."""
    from blockskip_pack.blockskip_core.accounting.plan import CARDS, MARGIN, largest_that_fits, room_of_card

    rooms = [room_of_card(card) for card in CARDS]
    lines = [
        f"The best way that fits, and its counted peak in GiB, with {MARGIN:.0%} more for what is not counted; 1/8 of the card and 0.5 GiB "
        f"are left for other programs. {CROP} px, batch 1, with checkpointing. Best first: "
        f"{'; '.join(choice.label for choice in CHOICES)}. That is the order of R in the demo's world, where the weights of the "
        "trained blocks were in float32. Default is *skip and freeze* at 0.5; *preset* has its last blocks frozen in 4-bit, constant "
        "is the paper's way. Weights that do not fit can be streamed in any format; that is slower, and not in this table.", "",
        f"| | {' | '.join(f'{card}: {room / GIB:.2f}' for card, room in zip(CARDS, rooms, strict=True))} |",
        "|---" * (len(rooms) + 1) + "|",
    ]  # fmt: skip
    for part in dict.fromkeys(row["part"] for row in rows):
        peaks = {choice.label: peak for choice in CHOICES if (peak := _peak(rows, part, choice)) is not None}
        if len(peaks) == len(CHOICES):
            cells = " | ".join(_best(peaks, largest_that_fits(room)) for room in rooms)
            lines.append(f"| {'FLUX.1-dev' if part == 'BlockSkip' else part} | {cells} |")
    return lines


def _peak(rows: Sequence[Row], part: str, choice: Choice) -> int | None:
    wanted = {"part": part, "size": CROP, "weights_format": choice.weights, "source": "cached", "checkpointing": True}
    return next((row["peak"] for row in rows if row["name"] in choice.names and wanted.items() <= row.items()), None)


def _best(peaks: dict[str, int], most: int) -> str:
    return next((f"{label}: {peak / GIB:.2f}" for label, peak in peaks.items() if peak <= most), "streamed")

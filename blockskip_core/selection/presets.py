"""The paper's selections for FLUX.1, also scaled to other models and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .selection import BlockSelection, num_skipped

# The paper's choices for FLUX.1 (57 blocks, DINO, CustomConcept101): budget ratio -> (front, back). Second hand: we
# know the paper's table only from a third party's README; the parameter memory that it implies agrees with the paper's
# memory tables.
PAPER_FLUX_SELECTIONS: dict[float, tuple[int, int]] = {0.3: (7, 10), 0.4: (13, 10), 0.5: (19, 10)}
PAPER_FAMILY = "flux"  # another family can have the same number of blocks (Chroma does)
PAPER_FLUX_BLOCKS = 57


def preset_selection(
    skip_ratio: float, num_blocks: int, family: str, block_bytes: Sequence[int] = ()
) -> BlockSelection:
    """Return the paper's FLUX choice, or that choice scaled to another number of blocks or another ratio.

    Between the paper's three ratios the share of front blocks is interpolated; beyond them the nearest one is used.

    Raises:
        InvalidInputError: See :func:`num_skipped`.
    """
    budget = num_skipped(skip_ratio, num_blocks)
    front = math.floor(budget * _front_share(skip_ratio) + 0.5)
    of_the_paper = PAPER_FLUX_SELECTIONS.get(round(skip_ratio, 6)) == (front, budget - front)
    exact = family == PAPER_FAMILY and num_blocks == PAPER_FLUX_BLOCKS and of_the_paper
    note = (
        "These are the paper's indices for FLUX.1 (DINO)."
        if exact
        else f"Scaled from the paper's indices for FLUX.1 ({PAPER_FLUX_BLOCKS} blocks; 30, 40 and 50 %): "
        "not measured on this model. The attention mask method measures them."
    )
    return BlockSelection(
        front=front,
        back=budget - front,
        num_blocks=num_blocks,
        family=family,
        method="preset",
        block_bytes=tuple(block_bytes),
        note=note,
    )


def _front_share(skip_ratio: float) -> float:
    knots = [(ratio, n / (n + m)) for ratio, (n, m) in sorted(PAPER_FLUX_SELECTIONS.items())]
    if skip_ratio <= knots[0][0]:
        return knots[0][1]
    for (low, low_share), (high, high_share) in zip(knots, knots[1:], strict=False):
        if skip_ratio <= high:
            return low_share + (skip_ratio - low) / (high - low) * (high_share - low_share)
    return knots[-1][1]

"""Skip a few first blocks and freeze twice as many last ones, so that a LoRA sits between them.

Not in the paper, which skips about a third of the blocks at the front and a sixth at the back. What is skipped at the
front is exact in value and gradient, but no LoRA can be there; the more is skipped, the less of what the model does with
the text can change. What is frozen at the back runs, so it saves operations of the backward pass only, and memory if its
weights are stored in fewer bits: half of those of a model in 16 bits, none of one in eight.

With a ratio r the first r / 2 of the blocks are skipped and the last r are frozen, so that r of the bytes of a model in
16 bits with equal blocks are not needed: r / 2 because they are skipped, r / 2 because r of them take eight bits. The
proportion of 1 to 2 is the one that is measured: on the demo's model, with r = 0.5 and twice the learning rate, it learns
0.96 of what a LoRA on all blocks does, where the paper's proportion learns 0.80 (``benchmarks/quality.py``). On large
models it is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InvalidInputError
from .selection import BlockSelection, num_skipped

MAX_RATIO = 0.6
"""With more, hardly a block would be left between the skipped and the frozen ones."""


def skip_and_freeze(skip_ratio: float, num_blocks: int, family: str, block_bytes: Sequence[int] = ()) -> BlockSelection:
    """Return the selection that skips the first half of a ratio and freezes the last blocks up to the ratio.

    Args:
        skip_ratio: r, from 0 to :data:`MAX_RATIO`; halves of blocks are rounded up.
        num_blocks: Number of blocks of the model.
        family: The model family.
        block_bytes: Weight bytes of each block, for reports.

    Raises:
        InvalidInputError: If the ratio is out of range, or leaves no block to train.
    """
    if not 0.0 <= skip_ratio <= MAX_RATIO:
        raise InvalidInputError(
            f"skip_ratio must be between 0 and {MAX_RATIO} for `skip and freeze`, which skips half of that share of the blocks "
            f"and freezes all of it; got {skip_ratio}."
        )
    front, frozen = num_skipped(skip_ratio / 2, num_blocks), num_skipped(skip_ratio, num_blocks)
    if front + frozen >= num_blocks:
        raise InvalidInputError(
            f"skip_ratio {skip_ratio} would skip {front} and freeze {frozen} of {num_blocks} blocks and leave none to train. "
            "Lower it."
        )
    return BlockSelection(
        front=front,
        back=0,
        frozen=frozen,
        num_blocks=num_blocks,
        family=family,
        method="skip and freeze",
        block_bytes=tuple(block_bytes),
        note=(
            "Measured on a small model only, with twice the usual learning rate. Frozen blocks of a model in 16 bits take half "
            "of their bytes."
        ),
    )

"""Which blocks keep their activations for the backward pass, and which recompute them.

Recomputing every block (arXiv 1604.06174) takes the least memory and the time of one more forward pass. Where memory is
left, some blocks can keep their activations. These should be the *last* blocks: backward reaches them first and frees
what they keep before it recomputes an earlier block, so with k of them the peak above the stored block inputs is

    max(what the last k keep together, what one block needs)

and the sum may fill the whole budget. How much a block would keep is counted on the block itself, with the real shapes
and kernels: its first forward is run a second time with a counter on what autograd saves, and that graph is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .stand_ins import TrainedBlock


class ActivationBudget:
    """Allows the last blocks to keep their activations, up to a number of bytes.

    Args:
        blocks: The trained blocks in execution order, checkpointed.
        budget_bytes: Bytes that the blocks that are not recomputed may keep together; 0 recomputes all.
    """

    def __init__(self, blocks: Sequence[TrainedBlock], budget_bytes: float) -> None:
        self._blocks = blocks
        self._budget_bytes = budget_bytes
        self._counted_for = 0

    @contextmanager
    def forward(self, num_tokens: int) -> Iterator[None]:
        """Context for a forward pass; a pass larger than any before recomputes all blocks and counts them.

        Args:
            num_tokens: Number of tokens in all rows of the batch.
        """
        counting = self._budget_bytes > 0 and num_tokens > self._counted_for
        if not counting:
            yield
            return
        for block in self._blocks:
            block.checkpointed = block.counting = True
        try:
            yield
        finally:
            for block in self._blocks:
                block.counting = False
        self._counted_for = num_tokens
        self._choose()

    def _choose(self) -> None:
        left = self._budget_bytes
        for block in reversed(self._blocks):
            left -= block.activation_bytes
            if left < 0:
                return
            block.checkpointed = False

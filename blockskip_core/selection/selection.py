"""Which blocks to skip: the first n, and a span near the end (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.2).

The paper replaces both spans by what they computed before training. At the front that is exact, in value and gradient,
because the output of a front block does not depend on the LoRA after it. At the back neither is exact: the input of the
last blocks changes with the LoRA, and the gradient passes as if they were not there. So the last blocks can be *frozen*
instead of skipped, which is not in the paper: they have no adapters but run forward and backward, which equals training
the whole model with a LoRA on the middle blocks. This takes memory and time; to save memory, their weights can be
quantised and their activations recomputed.

Nor does the paper leave the end of the model in place: here a few last blocks, the *tail*, may stay and be trained, so that
the skipped span lies in front of them. From the first block to the last:

    front    skipped, exact
    middle   trained
    frozen   run without adapters, exact
    back     skipped, exact at the start of the training only; the paper's last m
    tail     trained
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import InvalidInputError
from ..units import format_bytes

MAX_SKIP_RATIO = 0.9


BlockRole = Literal["front", "trained", "frozen", "back"]
SelectionMethod = Literal["attention mask", "preset", "manual", "cost and influence", "skip and freeze"]


def num_skipped(skip_ratio: float, num_blocks: int) -> int:
    """Return how many of ``num_blocks`` a ratio skips, halves rounded up (like the paper's 17, 23, 29 of 57).

    Raises:
        InvalidInputError: If the ratio is outside [0, 0.9] or leaves no block to train.
    """
    if not 0.0 <= skip_ratio <= MAX_SKIP_RATIO:
        raise InvalidInputError(f"skip_ratio must be between 0 and {MAX_SKIP_RATIO}, got {skip_ratio}.")
    count = math.floor(skip_ratio * num_blocks + 0.5 + 1e-9)
    if count >= num_blocks:
        raise InvalidInputError(
            f"skip_ratio {skip_ratio} would skip all {num_blocks} blocks and leave none to train. Lower it."
        )
    return count


@dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """The blocks that are replaced by stored residuals: the first ``front``, and ``back`` in front of the tail.

    Attributes:
        front, back: The paper's n and m.
        frozen: How many of the blocks before the skipped back run without adapters.
        tail: How many of the last blocks are trained after the back; 0 in the paper.
        num_blocks: Number of blocks in the model.
        family: Name of the model family.
        method: How it was chosen.
        block_bytes: Bytes of the weights of each block as loaded, for reports.
        note: One sentence for users on where the numbers come from.

    Raises:
        InvalidInputError: If a count is negative or no block is left to train.
    """

    front: int
    back: int
    num_blocks: int
    family: str = ""
    method: SelectionMethod = "manual"
    block_bytes: tuple[int, ...] = field(default=(), compare=False)
    note: str = field(default="", compare=False)
    frozen: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        if self.front < 0 or self.back < 0:
            raise InvalidInputError(f"front and back must not be negative, got {self.front} and {self.back}.")
        if self.frozen < 0:
            raise InvalidInputError(f"frozen must not be negative, got {self.frozen}.")
        if self.tail < 0:
            raise InvalidInputError(f"tail must not be negative, got {self.tail}.")
        if self.front + self.back + self.frozen >= self.num_blocks:
            raise InvalidInputError(
                f"Skipping the first {self.front} and the last {self.back + self.frozen} of {self.num_blocks} blocks "
                f"leaves none to train. Lower front or back so that together they are at most {self.num_blocks - 1}."
            )
        if self.front + self.back + self.frozen + self.tail >= self.num_blocks:
            raise InvalidInputError(
                f"Skipping the first {self.front} blocks and {self.back + self.frozen} in front of the last {self.tail} "
                f"of {self.num_blocks} leaves none to train between them. Keep fewer last blocks, or skip fewer."
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the blocks that run in training."""
        return (*self.middle, *self.frozen_span, *self.tail_span)

    @property
    def adapted(self) -> tuple[int, ...]:
        """Indices of the blocks that get adapters."""
        return (*self.middle, *self.tail_span)

    @property
    def middle(self) -> range:
        """Indices of the trained blocks after the front."""
        return range(self.front, self.num_blocks - self.tail - self.back - self.frozen)

    @property
    def frozen_span(self) -> range:
        """Indices of the blocks that run without adapters."""
        return range(self.middle.stop, self.back_span.start)

    @property
    def tail_span(self) -> range:
        """Indices of the trained blocks after the back."""
        return range(self.num_blocks - self.tail, self.num_blocks)

    def role_of(self, index: int) -> BlockRole:
        """Return what becomes of a block: skipped at the front, trained, frozen, or skipped near the end."""
        if index in self.adapted:
            return "trained"
        if index in self.frozen_span:
            return "frozen"
        return "front" if index < self.front else "back"

    def with_exact_back(self) -> BlockSelection:
        """Return the selection with its back frozen instead of skipped, so that nothing is approximated.

        A tail stays trained. What the frozen blocks pass on to it, and the gradient that it sends through them, are
        those of the whole model.
        """
        return replace(self, back=0, frozen=self.frozen + self.back)

    @property
    def front_span(self) -> range:
        """Indices of the first, skipped blocks."""
        return range(self.front)

    @property
    def back_span(self) -> range:
        """Indices of the skipped blocks in front of the tail."""
        return range(self.num_blocks - self.tail - self.back, self.num_blocks - self.tail)

    @property
    def back_has_text(self) -> bool:
        """Whether a kept block reads the text tokens that leave the back; no head does."""
        return self.back > 0 and self.tail > 0

    @property
    def fingerprint(self) -> str:
        """Content hash of what determines the residuals, 32 hexadecimal digits; frozen blocks have no residuals."""
        place = [self.tail] if self.back_has_text else []  # nothing is added for the paper's form, so that caches stay
        content = json.dumps([self.front, self.back, self.num_blocks, self.family, *place])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def require_for(self, num_blocks: int, family: str) -> None:
        """Raise InvalidInputError unless this is a selection for a model with these blocks."""
        if (self.num_blocks, self.family) != (num_blocks, family):
            raise InvalidInputError(
                f"The selection was made for {self.num_blocks} blocks of {self.family}, this model has {num_blocks} of "
                f"{family}. Select blocks of the same model."
            )

    @property
    def kept_bytes(self) -> int:
        """Weight bytes of the kept blocks."""
        return sum(self.block_bytes[index] for index in self.kept)

    @property
    def skipped_bytes(self) -> int:
        """Weight bytes of the skipped blocks."""
        return sum(self.block_bytes) - self.kept_bytes

    @property
    def skipped_words(self) -> str:
        """Which blocks are skipped, in words."""
        back = f"{self.back} in front of the last {self.tail}" if self.back_has_text else f"the last {self.back}"
        return f"the first {self.front}{f' and {back}' if self.back else ''} of {self.num_blocks}"

    def describe(self) -> str:
        """Return the selection in blocks and bytes, several lines."""
        skipped = self.front + self.back
        lines = [f"Skip {self.skipped_words} blocks ({skipped / self.num_blocks:.0%}); train {len(self.adapted)}."]
        if self.frozen:
            where = f"{self.frozen} in front of the last {self.tail}" if self.tail else f"The last {self.frozen}"
            lines.append(f"{where} also run in training, without adapters.")
        if self.block_bytes:
            total = sum(self.block_bytes)
            lines.append(
                f"Block weights: {format_bytes(total)}; kept {format_bytes(self.kept_bytes)}, not needed while "
                f"training {format_bytes(self.skipped_bytes)} ({self.skipped_bytes / max(total, 1):.0%})."
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

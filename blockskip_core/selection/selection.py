"""Which blocks to skip: the first n and the last m (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.2, Eq. 2, Alg. 1).

The influence of a run of blocks on the subject is read from what happens to a picture when its image tokens may no
longer look at the text there. For a budget of k skipped blocks,

    (n*, m*) = argmin_{n + m = k}  sum_j [ D(x_j, front-masked_j(n)) + D(x_j, back-masked_j(m)) ],   D = 1 - cosine

The sum separates into a part that depends on n and a part that depends on m, so N (1 + n_max + m_max) pictures serve
every budget: a :class:`TextInfluence` is measured once, and a selection is then a look-up.

This module holds the arithmetic. How attention is masked stands in ``masked_attention.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidInputError

MAX_SKIP_RATIO = 0.9

# The paper's choices for FLUX.1 (57 blocks, DINO, CustomConcept101): budget ratio -> (front, back). Second hand: the
# paper's table is only known to us through a third party's README; the parameter memory it implies agrees with the
# paper's memory tables.
PAPER_FLUX_SELECTIONS: dict[float, tuple[int, int]] = {0.3: (7, 10), 0.4: (13, 10), 0.5: (19, 10)}
PAPER_FAMILY = "flux"  # another family can have as many blocks (Chroma has)
PAPER_FLUX_BLOCKS = 57
PAPER_WINDOW = 14  # consecutive blocks masked at a time in the paper's Fig. 3

SelectionMethod = Literal["attention mask", "preset", "manual"]


def num_skipped(skip_ratio: float, num_blocks: int) -> int:
    """Return how many of ``num_blocks`` a ratio skips, halves rounded up (as the paper's 17, 23, 29 of 57 are).

    Raises:
        InvalidInputError: If the ratio is outside [0, 0.9] or leaves no block to train.
    """
    if not 0.0 <= skip_ratio <= MAX_SKIP_RATIO:
        raise InvalidInputError(f"skip_ratio must lie between 0 and {MAX_SKIP_RATIO}, got {skip_ratio}.")
    count = math.floor(skip_ratio * num_blocks + 0.5 + 1e-9)
    if count >= num_blocks:
        raise InvalidInputError(
            f"skip_ratio {skip_ratio} would skip all {num_blocks} blocks and leave none to train. Lower it."
        )
    return count


@dataclass(frozen=True, kw_only=True)
class BlockSelection:
    """The blocks that are replaced by stored residuals: the first ``front`` and the last ``back`` of ``num_blocks``.

    Attributes:
        front, back: The paper's n and m.
        num_blocks: All blocks of the model, in execution order.
        family: Name of the model family.
        method: How it was chosen.
        block_bytes: Bytes of the weights of each block as loaded, for reports.
        note: One sentence for people on where the numbers come from.

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

    def __post_init__(self) -> None:
        if self.front < 0 or self.back < 0:
            raise InvalidInputError(f"front and back must not be negative, got {self.front} and {self.back}.")
        if self.front + self.back >= self.num_blocks:
            raise InvalidInputError(
                f"Skipping the first {self.front} and the last {self.back} of {self.num_blocks} blocks leaves none "
                f"to train. Lower front or back so that together they are at most {self.num_blocks - 1}."
            )

    @property
    def kept(self) -> range:
        """Indices of the blocks that are trained."""
        return range(self.front, self.num_blocks - self.back)

    @property
    def front_span(self) -> range:
        """Indices of the first, skipped blocks."""
        return range(self.front)

    @property
    def back_span(self) -> range:
        """Indices of the last, skipped blocks."""
        return range(self.num_blocks - self.back, self.num_blocks)

    @property
    def fingerprint(self) -> str:
        """Content hash of what decides the residuals, 32 hexadecimal digits."""
        content = json.dumps([self.front, self.back, self.num_blocks, self.family])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def require_for(self, num_blocks: int, family: str) -> None:
        """Raise InvalidInputError unless this is a selection for a model with these blocks."""
        if (self.num_blocks, self.family) != (num_blocks, family):
            raise InvalidInputError(
                f"The selection was made for {self.num_blocks} blocks of {self.family}, this model has {num_blocks} of "
                f"{family}. Connect the same MODEL to Select Blocks."
            )

    @property
    def kept_bytes(self) -> int:
        """Weight bytes of the blocks that stay."""
        return sum(self.block_bytes[index] for index in self.kept)

    @property
    def skipped_bytes(self) -> int:
        """Weight bytes of the blocks that are skipped."""
        return sum(self.block_bytes) - self.kept_bytes

    def describe(self) -> str:
        """Return the selection in blocks and bytes, several lines."""
        skipped = self.front + self.back
        lines = [
            f"Skip the first {self.front} and the last {self.back} of {self.num_blocks} blocks "
            f"({skipped / self.num_blocks:.0%}); train {len(self.kept)}.",
        ]
        if self.block_bytes:
            total = sum(self.block_bytes)
            lines.append(
                f"Block weights: {format_bytes(total)}; kept {format_bytes(self.kept_bytes)}, not needed while "
                f"training {format_bytes(self.skipped_bytes)} ({self.skipped_bytes / max(total, 1):.0%})."
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Return a byte count for people, e.g. "7.38 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024.0:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024.0
    return f"{count:.2f} GiB"


def preset_selection(
    skip_ratio: float, num_blocks: int, family: str, block_bytes: Sequence[int] = ()
) -> BlockSelection:
    """Return the paper's FLUX choice, or that choice scaled to another number of blocks or another ratio.

    Between the paper's three ratios the share of front blocks is interpolated; beyond them the nearest is taken.

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
        "not measured on this model. The attention mask method measures it."
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


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """Return ``1 - cosine similarity`` of two equally shaped tensors, in float64; 0 for equal directions, at most 2."""
    a, b = a.flatten().double().cpu(), b.flatten().double().cpu()
    norms = a.norm() * b.norm()
    if norms == 0.0:
        return 0.0 if torch.equal(a, b) else 1.0
    return float(1.0 - (a @ b) / norms)


def window_length(num_blocks: int) -> int:
    """Return the length of the sliding window: 14 of 57 blocks (the paper's Fig. 3), scaled."""
    return max(1, round(num_blocks * PAPER_WINDOW / PAPER_FLUX_BLOCKS))


@dataclass
class TextInfluence:
    """Distances measured so far: what masking a run of blocks does to the picture, summed over the probe pictures.

    Attributes:
        num_blocks: All blocks of the model.
        metric: What the cosine was taken of, for people ("DINOv2 embedding", "latents", ...).
        front: Blocks masked at the front -> summed distance. ``front[0]`` is 0 by definition.
        back: The same for the last blocks.
        window: First block of the sliding window -> summed distance.
        num_pictures: How many probe pictures each sum is over.
    """

    num_blocks: int
    metric: str = "latents"
    front: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    back: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    window: dict[int, float] = field(default_factory=dict)
    num_pictures: int = 1

    def missing(self, budget: int, *, with_window: bool = True) -> dict[tuple[str, int], frozenset[int]]:
        """Return the runs still to be measured for budgets up to ``budget``: (kind, key) -> block indices masked."""
        runs: dict[tuple[str, int], frozenset[int]] = {}
        for count in range(1, budget + 1):
            if count not in self.front:
                runs["front", count] = frozenset(range(count))
            if count not in self.back:
                runs["back", count] = frozenset(range(self.num_blocks - count, self.num_blocks))
        if with_window:
            length = window_length(self.num_blocks)
            for start in range(self.num_blocks - length + 1):
                if start not in self.window:
                    runs["window", start] = frozenset(range(start, start + length))
        return runs

    def record(self, run: tuple[str, int], distance: float) -> None:
        """Keep the summed distance of one run.

        Raises:
            InvalidInputError: If the distance is not finite: the model made no usable picture.
        """
        kind, key = run
        if not math.isfinite(distance):
            raise InvalidInputError(
                f"Masking the text in the {kind} run {key} gave a picture that is not finite. "
                "Check that the model and its precision can sample a picture."
            )
        getattr(self, kind)[key] = distance

    def select(self, budget: int) -> tuple[int, int]:
        """Return (n*, m*) for a budget of skipped blocks (Eq. 2); the smaller n wins a tie.

        Raises:
            InvalidInputError: If a distance that is needed has not been measured.
        """
        absent = list(self.missing(budget, with_window=False))
        if absent:
            raise InvalidInputError(f"{len(absent)} masked pictures are missing for a budget of {budget} blocks.")
        return min(((n, budget - n) for n in range(budget + 1)), key=lambda nm: self.front[nm[0]] + self.back[nm[1]])

    def to_json(self) -> str:
        """Return the measurement as text, with a checksum."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({**content, "checksum": _checksum(content)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TextInfluence:
        """Read what :meth:`to_json` wrote; raises ValueError, TypeError, KeyError or
        AttributeError if it is something else."""
        content = json.loads(text)
        checksum = content.pop("checksum", None)  # not in older files
        if checksum not in (None, _checksum(content)):
            raise ValueError("its checksum is another")
        for kind in ("front", "back", "window"):
            content[kind] = {int(key): float(value) for key, value in content[kind].items()}
        return cls(**content)


def _checksum(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def measured_selection(
    influence: TextInfluence, skip_ratio: float, family: str, block_bytes: Sequence[int] = ()
) -> BlockSelection:
    """Return the selection that the measurement gives for a ratio.

    Raises:
        InvalidInputError: See :func:`num_skipped` and :meth:`TextInfluence.select`.
    """
    front, back = influence.select(num_skipped(skip_ratio, influence.num_blocks))
    return BlockSelection(
        front=front,
        back=back,
        num_blocks=influence.num_blocks,
        family=family,
        method="attention mask",
        block_bytes=tuple(block_bytes),
        note=f"Measured by masking image-to-text attention; distance = 1 - cosine of the {influence.metric}, "
        f"{influence.num_pictures} probe picture(s).",
    )


def selection_table(influence: TextInfluence, block_bytes: Sequence[int]) -> str:
    """Return (n*, m*) and bytes saved for every budget measured so far, one line each."""
    rows = []
    budget = 0
    while not influence.missing(budget, with_window=False) and budget < influence.num_blocks:
        front, back = influence.select(budget)
        selection = BlockSelection(
            front=front, back=back, num_blocks=influence.num_blocks, block_bytes=tuple(block_bytes)
        )
        distance = influence.front[front] + influence.back[back]
        rows.append(
            f"{budget:>4} skipped ({budget / influence.num_blocks:>4.0%}): first {front:>2}, last {back:>2}, "
            f"distance {distance:.4f}, saves {format_bytes(selection.skipped_bytes)}"
        )
        budget += 1
    return "\n".join(rows)

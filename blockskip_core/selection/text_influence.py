"""Which blocks to skip, measured (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.2, Eq. 2, Alg. 1).

The influence of a run of blocks on the subject is measured by how a picture changes when its image tokens cannot see
the text in these blocks. For a budget of k skipped blocks,

    (n*, m*) = argmin_{n + m = k}  sum_j [ D(x_j, front-masked_j(n)) + D(x_j, back-masked_j(m)) ],   D = 1 - cosine

The sum separates into a part that depends on n and a part that depends on m, so N (1 + n_max + m_max) pictures suffice
for every budget: a :class:`TextInfluence` is measured once, and a selection is then a look-up.

This module has the arithmetic and the loop; for how attention is masked, see ``masked_attention``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InvalidInputError
from ..units import format_bytes
from .presets import PAPER_FLUX_BLOCKS
from .selection import BlockSelection, num_skipped

PAPER_WINDOW = 14  # consecutive blocks masked at a time in the paper's Fig. 3


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
    """Distances measured so far: how much masking a run of blocks changes a picture, summed over the probe pictures.

    Attributes:
        num_blocks: Number of blocks in the model.
        metric: Readable name of the vectors compared by cosine ("DINOv2 embedding", "latents", ...).
        front: Number of blocks masked at the front -> summed distance. ``front[0]`` is 0 by definition.
        back: Likewise for the last blocks.
        window: First block of the sliding window -> summed distance.
        num_pictures: Number of probe pictures in each sum.
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
        """Store the summed distance of one run.

        Raises:
            InvalidInputError: If the distance is not finite, because the model made no usable picture.
        """
        kind, key = run
        if not math.isfinite(distance):
            raise InvalidInputError(
                f"Masking the text in the {kind} run {key} gave a picture that is not finite. "
                "Check that the model and its precision can sample a picture."
            )
        getattr(self, kind)[key] = distance

    def select(self, budget: int) -> tuple[int, int]:
        """Return (n*, m*) for a budget of skipped blocks (Eq. 2); in a tie the smaller n wins.

        Raises:
            InvalidInputError: If a required distance has not been measured.
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
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: If the text is something else.
        """
        content = json.loads(text)
        checksum = content.pop("checksum", None)  # not in older files
        if checksum not in (None, _checksum(content)):
            raise ValueError("its checksum does not match")
        for kind in ("front", "back", "window"):
            content[kind] = {int(key): float(value) for key, value in content[kind].items()}
        return cls(**content)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


class ProbeSampler(Protocol):
    """Makes the probe pictures.

    Attributes:
        steps: Total sampler steps of all pictures.
    """

    steps: int

    def embeddings(self, masked: frozenset[int], on_step: Callable[[], None]) -> Sequence[Tensor]:
        """Sample every probe picture, always from the same noise, and return the vectors to compare.

        Args:
            masked: Indices of the blocks whose image tokens cannot see the text.
            on_step: Called after every sampler step; may raise to interrupt.
        """
        ...


def measure(
    influence: TextInfluence,
    sampler: ProbeSampler,
    budget: int,
    *,
    with_window: bool = True,
    keep: Callable[[TextInfluence], None] = lambda influence: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextInfluence:
    """Measure the missing distances for budgets up to ``budget`` (Alg. 1): sample plain pictures and masked ones.

    Args:
        influence: Earlier measurements; new ones are added to it.
        sampler: Makes the pictures.
        budget: Maximum number of blocks to skip.
        with_window: Whether the sliding window is measured as well.
        keep: Called after every distance, so that an interrupted measurement can continue.
        progress: Called after every sampler step with (done, total); may raise to interrupt.
    """
    runs = influence.missing(budget, with_window=with_window)
    if not runs:
        return influence
    total, done = (1 + len(runs)) * sampler.steps, itertools.count(1)

    def on_step() -> None:
        progress(next(done), total)

    plain = sampler.embeddings(frozenset(), on_step)
    for run, masked in runs.items():
        pairs = zip(plain, sampler.embeddings(masked, on_step), strict=True)
        influence.record(run, sum(cosine_distance(a, b) for a, b in pairs))
        keep(influence)
    return influence


def measured_selection(
    influence: TextInfluence, skip_ratio: float, family: str, block_bytes: Sequence[int] = ()
) -> BlockSelection:
    """Return the measured selection for a ratio.

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

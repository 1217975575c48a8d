"""Which blocks to skip for a number of bytes: the least influence lost, where what is skipped exactly costs less.

Difference from the paper: DiT-BlockSkip (arXiv 2603.20755, Sec. 3.2, Eq. 2) counts blocks and weighs both ends alike. But
skipping is two questions: which blocks carry the subject, so that the LoRA should be in them, and which can be left out
without an error. At the front skipping is exact in value and gradient. At the back both are approximated, unless the
back runs frozen (``BlockSelection.with_exact_back``). So here, with F and B the distances of ``text_influence``,

    (n*, m*, k*) = argmin  F(n) + price * (B(m + k) - B(k))      over n, m, k that skip at least so many bytes

where the first n blocks are skipped, and m in front of the last k. With the last blocks trained, a layer that sees the
whole model's tokens lies between the approximated span and the head.

Without a measurement nothing is known about the blocks, and as many as possible are skipped where that is exact: front
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError
from ..units import format_bytes
from .selection import MAX_SKIP_RATIO, BlockSelection
from .text_influence import TextInfluence

BACK_PRICE = 2.0
"""How much worse it is to skip influence at the back, where it is approximated, than at the front.

Chosen by hand. The paper loses 3.7 times as much by skipping only last blocks as by skipping only first ones (its Table
2, DINO, second hand), partly because its last blocks have more influence.
"""
TAILS = (1, 2, 3)
"""Numbers of last blocks to keep that are tried unless one is asked for."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A choice of blocks, and what it is predicted to lose.

    Attributes:
        front, back, tail: n, m and k.
        skipped_bytes: Weight bytes of the skipped blocks.
        loss: Predicted loss of influence; without a measurement the number of approximated blocks.
    """

    front: int
    back: int
    tail: int
    skipped_bytes: int
    loss: float


def candidates(
    block_bytes: Sequence[int],
    least_bytes: int,
    influence: TextInfluence | None,
    tails: Iterable[int],
    back_price: float,
) -> Iterator[Candidate]:
    """Yield every choice that skips enough bytes, and whose influence is known if there is a measurement.

    Args:
        block_bytes: Weight bytes of each block.
        least_bytes: Bytes to skip, at least.
        influence: The measurement, or None.
        tails: Numbers of last blocks to keep.
        back_price: See :data:`BACK_PRICE`.
    """
    count = len(block_bytes)
    upto = [0, *itertools.accumulate(block_bytes)]
    places = [(0, 0), *((m, k) for k in tails for m in range(1, count - k))]
    for m, k in places:
        lost = _lost_at_back(influence, m, k)
        for n in range(count - m - k):
            skipped = upto[n] + upto[count - k] - upto[count - k - m]
            known = influence is None or n in influence.front
            if lost is None or not known or skipped < least_bytes:
                continue
            front = influence.front[n] if influence else 0.0
            yield Candidate(front=n, back=m, tail=k, skipped_bytes=skipped, loss=front + back_price * lost)


def _lost_at_back(influence: TextInfluence | None, back: int, tail: int) -> float | None:
    """Return the influence of ``back`` blocks in front of a tail, or None if it is not known."""
    if influence is None or not back:
        return float(back)
    if back + tail not in influence.back or tail not in influence.back:
        return None
    return max(0.0, influence.back[back + tail] - influence.back[tail])  # measured, so it may fall by chance


def best_candidate(
    block_bytes: Sequence[int],
    least_bytes: int,
    influence: TextInfluence | None = None,
    *,
    tails: Sequence[int] = TAILS,
    back_price: float = BACK_PRICE,
) -> Candidate:
    """Return the choice of the smallest predicted loss; in a tie the one with the fewest approximated blocks, then bytes.

    Raises:
        InvalidInputError: If none skips enough.
    """
    found = candidates(block_bytes, least_bytes, influence, tails, back_price)
    best = min(found, key=lambda one: (one.loss, one.back, one.skipped_bytes, one.tail), default=None)
    if best is None:
        raise InvalidInputError(
            f"No choice of blocks skips {format_bytes(least_bytes)} of {format_bytes(sum(block_bytes))}"
            + (" within the spans that were measured" if influence else "")
            + " and keeps one to train. Lower skip_ratio"
            + (", or measure with `attention mask` at a higher one." if influence else ".")
        )
    return best


def affordable_selection(
    skip_ratio: float,
    family: str,
    block_bytes: Sequence[int],
    influence: TextInfluence | None = None,
    *,
    tails: Sequence[int] = TAILS,
) -> BlockSelection:
    """Return the selection that skips a share of the blocks' bytes at the smallest predicted loss of influence.

    Args:
        skip_ratio: Share of the bytes to skip, at least.
        family: The model family.
        block_bytes: Weight bytes of each block.
        influence: The measurement, or None for front first.
        tails: Numbers of last blocks to keep after a skipped span; 0 alone if the back will be exact.

    Raises:
        InvalidInputError: If the ratio is outside [0, 0.9], or no choice skips enough.
    """
    if not 0.0 <= skip_ratio <= MAX_SKIP_RATIO:
        raise InvalidInputError(f"skip_ratio must be between 0 and {MAX_SKIP_RATIO}, got {skip_ratio}.")
    least = round(skip_ratio * sum(block_bytes))
    best = best_candidate(block_bytes, least, influence, tails=tails)
    return BlockSelection(
        front=best.front,
        back=best.back,
        tail=best.tail,
        num_blocks=len(block_bytes),
        family=family,
        method="cost and influence",
        block_bytes=tuple(block_bytes),
        note=_note(best, influence),
    )


def _note(best: Candidate, influence: TextInfluence | None) -> str:
    exactness = "All that is skipped is exact." if not best.back else f"{best.back} skipped blocks are approximated."
    if influence is None:
        return f"No measurement is stored for this model and these probe settings, so front first. {exactness}"
    return (
        f"Predicted loss of influence {best.loss:.4g} ({influence.metric}, {influence.num_pictures} probe picture(s); "
        f"at the back it counts {BACK_PRICE:g} times). {exactness}"
    )

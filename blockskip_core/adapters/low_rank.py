"""Join low-rank changes of a weight, and raise or lower their rank, without changing their effect.

A change is ``up @ down``: ``up`` of shape (out, r) with its scale folded in, ``down`` of shape (r, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A change of some rows of a weight.

    Attributes:
        up: (rows of this part, r).
        down: (r, in).
        first_row: Where the part begins in the whole weight.
    """

    up: Tensor
    down: Tensor
    first_row: int = 0

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)


def joined(parts: Sequence[LowRank], rows: int) -> LowRank:
    """Return the change of a whole weight with ``rows`` rows whose parts other programs store as separate layers.

    Parts with the same ``down``, as when one change was split, share it, so splitting and joining is exact and does not
    raise the rank. Where ``down`` differs, the ranks add up.
    """
    downs: list[Tensor] = []
    for part in parts:
        if not any(torch.equal(part.down, down) for down in downs):
            downs.append(part.down)
    up = parts[0].up.new_zeros(rows, sum(map(len, downs)))
    column = 0
    for down in downs:
        for part in parts:
            if torch.equal(part.down, down):
                up[part.first_row : part.first_row + len(part.up), column : column + len(down)] += part.up
        column += len(down)
    return smallest(LowRank(up, torch.cat(downs)))


def smallest(change: LowRank) -> LowRank:
    """Return the same change with a rank of at most the weight's smaller side."""
    rows, columns = len(change.up), change.down.shape[1]
    if change.rank <= min(rows, columns):
        return change
    product = change.up @ change.down
    if rows < columns:
        return LowRank(torch.eye(rows).to(product), product)
    return LowRank(product, torch.eye(columns).to(product))


def filled_up(change: LowRank, down: Tensor) -> LowRank:
    """Return the same change with the rank of ``down`` (r', in), which supplies the additional directions.

    Their columns of ``up`` are zero, as in a LoRA that has not been trained yet.

    Raises:
        ValueError: If the change has a higher rank.
    """
    if change.rank > len(down):
        raise ValueError(f"a change of rank {change.rank} cannot be padded to rank {len(down)}")
    up = change.up.new_zeros(len(change.up), len(down))
    up[:, : change.rank] = change.up
    return LowRank(up, torch.cat((change.down, down[change.rank :].to(change.down))))

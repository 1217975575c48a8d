"""How training examples are grouped: into the micro-batches of a run, and into batches of rows that can be joined."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How a run goes through its draws: the only settings that a source of residuals needs.

    Attributes:
        steps: Optimiser steps.
        batch_size: Draws that go through the model together.
        accumulation: Micro-batches per optimiser step.
    """

    steps: int
    batch_size: int = 1
    accumulation: int = 1

    def __len__(self) -> int:
        """Return the number of forward and backward passes of the whole run."""
        return self.steps * self.accumulation

    def draws_of(self, micro_batch: int, num_draws: int) -> list[int]:
        """Return the draw indices of a micro-batch; a run longer than the schedule starts over."""
        start = micro_batch * self.batch_size
        return [index % num_draws for index in range(start, start + self.batch_size)]


def batches_of_equal_text(draws: Iterable[int], key_of: Callable[[int], Hashable], batch_size: int) -> list[list[int]]:
    """Return draw indices in batches of equal keys, in order of first appearance; a key tells a text's length."""
    groups: dict[Hashable, list[int]] = {}
    for draw in draws:
        groups.setdefault(key_of(draw), []).append(draw)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]

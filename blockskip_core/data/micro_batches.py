"""How training examples are grouped: into the micro-batches of a run, shared among processes, and rows that can be joined."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace

from ..errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How a run goes through its draws: the only settings that a source of residuals needs.

    If several processes share a run, each has the micro-batches of its own share, numbered from 0: of the
    ``accumulation`` micro-batches of every step, process r of R has ``accumulation / R`` in a row.

    Attributes:
        steps: Optimiser steps.
        batch_size: Draws that go through the model together.
        accumulation: Micro-batches per optimiser step, of all processes together.
        rank, processes: Whose share this is, and among how many.
    """

    steps: int
    batch_size: int = 1
    accumulation: int = 1
    rank: int = 0
    processes: int = 1

    def share_of(self, rank: int, processes: int) -> MicroBatches:
        """Return the share of one of several processes.

        Raises:
            InvalidInputError: If the micro-batches of a step cannot be shared equally.
        """
        if self.accumulation % processes:
            raise InvalidInputError(
                f"accumulation must be a multiple of the number of processes, got {self.accumulation} for {processes} "
                f"processes: each trains on its share of every step. Start the run with accumulation {processes}, or "
                "with another number of processes."
            )
        return replace(self, rank=rank, processes=processes)

    @property
    def per_step(self) -> int:
        """Micro-batches of this share in an optimiser step."""
        return self.accumulation // self.processes

    def __len__(self) -> int:
        """Return the number of forward and backward passes of the whole share."""
        return self.steps * self.per_step

    def draws_of(self, micro_batch: int, num_draws: int) -> list[int]:
        """Return the draw indices of a micro-batch; a run longer than the schedule starts over."""
        step, number = divmod(micro_batch, self.per_step)
        start = (step * self.accumulation + self.rank * self.per_step + number) * self.batch_size
        return [index % num_draws for index in range(start, start + self.batch_size)]

    def distinct_draws(self, micro_batches: Iterable[int], num_draws: int) -> list[int]:
        """Return the draw indices of some micro-batches, each once, in the order in which they first come."""
        return list(dict.fromkeys(draw for number in micro_batches for draw in self.draws_of(number, num_draws)))


def batches_of_equal_text(draws: Iterable[int], key_of: Callable[[int], Hashable], batch_size: int) -> list[list[int]]:
    """Return draw indices in batches of equal keys, in order of first appearance; a key tells a text's length."""
    groups: dict[Hashable, list[int]] = {}
    for draw in draws:
        groups.setdefault(key_of(draw), []).append(draw)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]

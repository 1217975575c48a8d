"""The bytes of a card: limited and counted."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MIB = 2**20


class Memory:
    """How many bytes a card has, and how many of them are taken.

    Every storage counts with its exact size. A real allocator rounds up to 512 bytes and keeps freed blocks, so what fits
    here by less than a few percent may not fit there.

    Args:
        total: Bytes of the card.

    Attributes:
        total: May be changed at any time, see :meth:`limited_to`.
        used: Bytes that are taken.
        peak: The most that were taken since :meth:`reset_peak`.
        allocations: How often bytes were asked for.
        refused: How often there were too few, injected failures included.
        on_take: Called with the number of bytes after each successful allocation, for tests that look who asks.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = self.peak = self.allocations = self.refused = 0
        self.on_take: Callable[[int], None] | None = None
        self._allocations_left: int | None = None
        self._lock = threading.RLock()  # autograd allocates in a thread of its own

    def free(self) -> int:
        """Return the bytes that are not taken."""
        return max(0, self.total - self.used)

    def take(self, num_bytes: int) -> None:
        """Take bytes.

        Raises:
            torch.OutOfMemoryError: If there are too few, or an injected failure is due.
        """
        with self._lock:
            self.allocations += 1
            self._fail_if_due(num_bytes)
            if self.used + num_bytes > self.total:
                gc.collect()  # a cycle of Python objects may hold tensors
                if self.used + num_bytes > self.total:
                    raise self._refusal(num_bytes)
            self.used += num_bytes
            self.peak = max(self.peak, self.used)
        if self.on_take is not None:
            self.on_take(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self.used -= num_bytes

    def reset_peak(self) -> None:
        """Start the peak anew from what is taken now."""
        self.peak = self.used

    def settled(self) -> int:
        """Return the bytes that are taken once unreachable objects are gone."""
        gc.collect()
        return self.used

    @contextmanager
    def limited_to(self, total: int) -> Iterator[None]:
        """Give the card another size for a while."""
        before, self.total = self.total, total
        try:
            yield
        finally:
            self.total = before

    @contextmanager
    def failing_after(self, allocations: int) -> Iterator[None]:
        """Let one allocation fail: the first behind so many that succeed."""
        self._allocations_left = allocations
        try:
            yield
        finally:
            self._allocations_left = None

    def _fail_if_due(self, num_bytes: int) -> None:
        if self._allocations_left is None:
            return
        if self._allocations_left == 0:
            self._allocations_left = None
            raise self._refusal(num_bytes)
        self._allocations_left -= 1

    def _refusal(self, num_bytes: int) -> torch.OutOfMemoryError:
        self.refused += 1
        return torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {num_bytes / MIB:.2f} MiB. GPU 0 has a total capacity of "
            f"{self.total / MIB:.2f} MiB of which {self.free() / MIB:.2f} MiB is free."
        )

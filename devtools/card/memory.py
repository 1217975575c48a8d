"""Limits and counts the bytes of a card."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MIB = 2**20


class Memory:
    """How many bytes a card has, and how many of them are in use.

    Every storage counts with its exact size. A real allocator rounds up to 512 bytes and keeps freed blocks, so what
    barely fits here (by less than a few percent) may not fit on a real card.

    Args:
        total: Bytes of the card.

    Attributes:
        total: May be changed at any time, see :meth:`limited_to`.
        used: Bytes in use.
        peak: The most bytes in use since :meth:`reset_peak`.
        allocations: Number of allocations, including refused ones.
        refused: Number of allocations refused because memory was short or a failure was injected.
        before_take: Called with the number of bytes before each allocation, so that others may give memory back.
        on_take: Called with the number of bytes after each successful allocation, for tests that check who allocates.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = self.peak = self.allocations = self.refused = 0
        self.before_take: Callable[[int], None] | None = None
        self.on_take: Callable[[int], None] | None = None
        self._allocations_left: int | None = None
        self._lock = threading.RLock()  # autograd allocates in its own thread

    def free(self) -> int:
        """Return the bytes that are not in use."""
        return max(0, self.total - self.used)

    def take(self, num_bytes: int) -> None:
        """Allocate bytes.

        Raises:
            torch.OutOfMemoryError: If too few are free, or an injected failure is due.
        """
        with self._lock:
            self.allocations += 1
            self._fail_if_due(num_bytes)
            if self.before_take is not None:
                self.before_take(num_bytes)
            if self.used + num_bytes > self.total:
                gc.collect()  # a cycle of Python objects may hold tensors
                if self.used + num_bytes > self.total:
                    raise self._refusal(num_bytes)
            self.used += num_bytes
            self.peak = max(self.peak, self.used)
        if self.on_take is not None:
            self.on_take(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Free bytes that were allocated."""
        with self._lock:
            self.used -= num_bytes

    def reset_peak(self) -> None:
        """Reset the peak to what is in use now."""
        self.peak = self.used

    def settled(self) -> int:
        """Collect unreachable objects and return the bytes still in use."""
        gc.collect()
        return self.used

    @contextmanager
    def limited_to(self, total: int) -> Iterator[None]:
        """Change the card's size temporarily."""
        before, self.total = self.total, total
        try:
            yield
        finally:
            self.total = before

    @contextmanager
    def failing_after(self, allocations: int) -> Iterator[None]:
        """Let ``allocations`` allocations succeed and the next one fail."""
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

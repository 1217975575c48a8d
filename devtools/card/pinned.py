"""Page-locked host memory: the ranges passed to ``cudaHostRegister``."""

from __future__ import annotations

import bisect
import ctypes

SUCCESS, ALREADY_REGISTERED, NOT_REGISTERED = 0, 712, 713  # cudaError_t


class PinnedMemory:
    """Registered ranges of host memory, with the method names and return codes of the CUDA runtime.

    Args:
        guard: The library of ``guard.install()``, which answers ``Tensor.is_pinned``.
    """

    def __init__(self, guard: ctypes.CDLL) -> None:
        self._note, self._note_gone = guard.note_pinned, guard.note_unpinned
        self._note.argtypes, self._note_gone.argtypes = [ctypes.c_size_t] * 2, [ctypes.c_size_t]
        self._sizes: dict[int, int] = {}  # by address
        self._addresses: list[int] = []  # the same, sorted

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """All registered bytes."""
        return sum(self._sizes.values())

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        """Register a range; one that overlaps another is refused, as by a driver."""
        place = bisect.bisect_left(self._addresses, address)
        before = self._addresses[place - 1] if place else None
        behind = self._addresses[place] if place < len(self._addresses) else None
        if (before is not None and before + self._sizes[before] > address) or (
            behind is not None and behind < address + size
        ):
            return ALREADY_REGISTERED
        self._addresses.insert(place, address)
        self._sizes[address] = size
        self._note(address, size)
        return SUCCESS

    def cudaHostUnregister(self, address: int) -> int:
        """Unregister the range that starts at an address."""
        if self._sizes.pop(address, None) is None:
            return NOT_REGISTERED
        self._addresses.remove(address)
        self._note_gone(address)
        return SUCCESS

    def forget_within(self, address: int, end: int) -> None:
        """Unregister all ranges that begin in [address, end), because that memory has been freed."""
        for start in [start for start in self._addresses if address <= start < end]:
            self.cudaHostUnregister(start)

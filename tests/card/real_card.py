"""A real card, with as much of an emulated one's surface as tests of both can use. Not run yet: no GPU was at hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class RealMemory:
    """The bytes that torch's allocator has given out, answering like ``devtools.card.Memory``."""

    @property
    def total(self) -> int:
        """Bytes of the card."""
        return torch.cuda.mem_get_info()[1]

    @property
    def peak(self) -> int:
        """The most that were given out since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        """Start the peak anew."""
        torch.cuda.reset_peak_memory_stats()

    def settled(self) -> int:
        """Return the bytes that are given out once all kernels are done and their workspaces and dead objects gone."""
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    @contextmanager
    def limited_to(self, total: int) -> Iterator[None]:
        """Let whoever asks believe that the card is so small. Nothing is refused."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.cuda, "mem_get_info", lambda device=None: (max(0, total - torch.cuda.memory_reserved()), total)
            )
            yield


class RealCard:
    """The first card of this machine."""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name(0)
        self.memory = RealMemory()

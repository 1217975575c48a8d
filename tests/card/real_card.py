"""A real card with the emulated card's interface, as far as shared tests need it. Not run yet: no GPU was available."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class RealMemory:
    """The bytes allocated by torch's allocator, with the interface of ``devtools.card.Memory``."""

    @property
    def total(self) -> int:
        """Bytes of the card."""
        return torch.cuda.mem_get_info()[1]

    @property
    def peak(self) -> int:
        """The most bytes allocated since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        """Reset the peak."""
        torch.cuda.reset_peak_memory_stats()

    def settled(self) -> int:
        """Return the allocated bytes once all kernels have finished and workspaces and dead objects are freed."""
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    @contextmanager
    def limited_to(self, total: int) -> Iterator[None]:
        """Report the card as this small; no allocation is refused."""
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

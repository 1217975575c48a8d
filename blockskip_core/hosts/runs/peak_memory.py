"""Peak memory of a run: allocated on the GPU if there is one, otherwise resident in the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ..models.residency import paged_bytes


class PeakMemory:
    """Tracks the memory of a device.

    Attributes:
        now, peak: Bytes at the last sample.
        peak_apart: Peak of work that does not count as part of the run, e.g. sampling.
        what: Readable name of what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.now = self.peak = self.peak_apart = 0
        self.what = "GPU memory allocated" if device.type == "cuda" else "process memory (RSS)"
        self.restart()

    def restart(self) -> None:
        """Restart the peak."""
        self.peak = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def sample(self) -> None:
        """Read the memory use now."""
        self.peak = max(self.peak, self._read())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Exclude this context from the run's peak (exactly on a GPU; elsewhere only samples are known)."""
        self.sample()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self.peak_apart = max(self.peak_apart, self._read())
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    def _read(self) -> int:
        """Return the highest use since the last reset; without a GPU, the current use."""
        if self._device.type == "cuda":
            paged = paged_bytes(self._device)  # allocated outside torch's allocator, so its peak is not known
            self.now = torch.cuda.memory_allocated(self._device) + paged
            return torch.cuda.max_memory_allocated(self._device) + paged
        self.now = psutil.Process().memory_info().rss
        return self.now

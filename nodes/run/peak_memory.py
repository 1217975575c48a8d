"""Peak memory of a run: allocated on the GPU where there is one, resident in the process otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ...blockskip_core.hosts.models.residency import paged_bytes


class PeakMemory:
    """Watches a device.

    Attributes:
        now, peak: Bytes, as of the last look.
        peak_apart: Peak of what was done apart from the run, e.g. sampling.
        what: What is counted, for people.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.now = self.peak = self.peak_apart = 0
        self.what = "GPU memory allocated" if device.type == "cuda" else "process memory (RSS)"
        self.restart()

    def restart(self) -> None:
        """Forget what was before."""
        self.peak = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def sample(self) -> None:
        """Look at the memory now."""
        self.peak = max(self.peak, self._look())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep what happens in this context out of the run's peak (on a GPU: elsewhere only samples are known)."""
        self.sample()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self.peak_apart = max(self.peak_apart, self._look())
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    def _look(self) -> int:
        """Return the highest since the last reset; without a GPU, what is taken now."""
        if self._device.type == "cuda":
            paged = paged_bytes(self._device)  # these come and go; torch's allocator does not know of them
            self.now = torch.cuda.memory_allocated(self._device) + paged
            return torch.cuda.max_memory_allocated(self._device) + paged
        self.now = psutil.Process().memory_info().rss
        return self.now

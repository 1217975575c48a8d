"""The sources of a training run's residuals: all from disk, a chunk at a time, or folded into each step.

``source`` explains the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from ..data.micro_batches import MicroBatches
from ..locks import lock, remove_stale_locks
from ..model import SkippableDit
from .back_response import FittedResponse
from .cache import CacheWriter, is_finished
from .cached_set import open_set, waiting_for_another, write_cache
from .chunks import compute_chunk, fitted_response, records_of
from .housekeeping import remove_unused, removed_if_damaged, scratch_folder
from .residual_set import PhaseProgress, ResidualSet, require_disk_space
from .source import OpenResiduals

Stretches = Iterator[AbstractContextManager[OpenResiduals]]


def source_of(
    residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress
) -> DiskSource | ChunkedSource | FoldedSource:
    """Return the source for the set's storage."""
    if residuals.storage == "on the fly":
        return FoldedSource()
    kind = DiskSource if residuals.storage == "disk" else ChunkedSource
    return kind(residuals, dit, progress)


class DiskSource:
    """All draws from a cache on disk, which is computed first if it is missing."""

    def __init__(self, residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress) -> None:
        self._residuals, self._dit, self._progress = residuals, dit, progress

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield one stretch: the whole run, from ``start`` on."""
        if start < len(run):
            write_cache(self._residuals, self._dit, self._progress)
            yield self._opened(run, range(start, len(run)))

    @contextmanager
    def _opened(self, run: MicroBatches, micro_batches: range) -> Iterator[OpenResiduals]:
        folder = self._residuals.folder
        with removed_if_damaged(lambda: remove_unused(folder)), self._reading():
            with open_set(self._residuals, run, micro_batches) as opened:
                yield opened

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Prevent other processes from removing the cache; if it was already removed, compute it again."""
        while True:
            with lock(self._residuals.folder, waiting_for_another(self._residuals, self._progress), shared=True):
                if is_finished(self._residuals.folder):
                    yield
                    return
            write_cache(self._residuals, self._dit, self._progress)


class ChunkedSource:
    """One chunk at a time: computed, trained on, removed. The disk never holds more than one."""

    def __init__(self, residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress) -> None:
        self._residuals, self._dit, self._progress = residuals, dit, progress
        self._fitted: FittedResponse | None = None

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield the run in stretches, each with the micro-batches of one chunk of draws.

        A run that starts within a chunk computes the rest of that chunk. A linear response is fitted first, on the same
        draws as with storage on disk.
        """
        remove_stale_locks(self._residuals.folder.parent)  # of chunks whose run was killed before creating their folder
        length = max(1, self._residuals.chunk_size // run.batch_size)
        if start < len(run):
            self._fitted = fitted_response(self._residuals, self._dit, self._progress)
        while start < len(run):
            end = min((start // length + 1) * length, len(run))
            yield self._chunk(run, range(start, end))
            start = end

    @contextmanager
    def _chunk(self, run: MicroBatches, micro_batches: range) -> Iterator[OpenResiduals]:
        draws = run.distinct_draws(micro_batches, len(self._residuals.schedule))
        with scratch_folder(self._residuals.folder) as folder:
            residuals = replace(self._residuals, folder=folder)
            require_disk_space(residuals, self._dit, draws)
            writer = CacheWriter(folder, residuals.identity)
            computed = compute_chunk(residuals, self._dit, draws, self._progress, self._fitted)
            writer.write(records_of(residuals, computed, self._fitted))
            writer.finish()
            with removed_if_damaged(lambda: True), open_set(residuals, run, micro_batches) as opened:
                yield opened


class FoldedSource:
    """Nothing stored: every step runs the whole network first."""

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield one stretch: the whole run, from ``start`` on."""
        if start < len(run):
            yield nullcontext(OpenResiduals(range(start, len(run)), None, None))

"""A set of residuals on disk: computed once, by one process at a time, and read by any number of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ..blocks.replay import Residual
from ..data.latents import Latents, joined
from ..data.micro_batches import MicroBatches
from ..errors import CacheError
from ..locks import lock, try_lock
from ..model import SkippableDit
from .back_response import FittedResponse
from .cache import CacheWriter, ResidualCache, is_finished, num_shards
from .chunks import compute_chunk, fitted_response, records_of
from .housekeeping import KEPT_CACHES, parts_of, remove_old_caches, remove_unused, removed_if_damaged
from .prefetch import prefetched
from .residual_set import PhaseProgress, ResidualSet, require_disk_space
from .source import OpenResiduals, Reference

_LATENT = "latent"
WAITING = "waiting for another process that computes the same residuals"


def write_cache(residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress) -> bool:
    """Compute and store the residuals of all draws; a finished cache is used, an unfinished one is resumed.

    If another process is computing the same residuals, this waits for its cache, which saves time and disk space. If
    that process ends early, this one continues where it stopped.

    Args:
        residuals: What to compute.
        dit: The model.
        progress: Called during the passes, and while waiting for another process.

    Returns:
        Whether anything was computed.

    Raises:
        InvalidInputError: If there is not enough disk space.
        StorageError: If the disk cannot be written.
    """
    if is_finished(residuals.folder):
        return False
    with lock(residuals.folder, waiting_for_another(residuals, progress)):
        if is_finished(residuals.folder):
            return False
        writer = resumed_writer(residuals)
        try:
            _write_missing(residuals, dit, progress, writer)
        finally:
            if not writer.draws:
                writer.discard()
    return True


def resumed_writer(residuals: ResidualSet) -> CacheWriter:
    """Return a writer that continues an unfinished cache, with what several processes have computed of it.

    The caller holds a lock on the cache.

    Raises:
        StorageError: If the disk cannot be written.
    """
    remove_old_caches(residuals.folder.parent, keep=KEPT_CACHES - 1, exclude=residuals.folder.name)
    writer = CacheWriter(residuals.folder, residuals.identity, resume=True)
    adopt_parts(writer, residuals.folder)
    return writer


def adopt_parts(writer: CacheWriter, folder: Path) -> None:
    """Take over all parts of a cache that no process is writing."""
    for part in parts_of(folder):
        held = try_lock(part)
        if held is not None:
            with held:
                writer.adopt(part)


def missing_draws(residuals: ResidualSet, writer: CacheWriter) -> list[int]:
    """Return the draws of the schedule that a cache has not yet."""
    return [draw for draw in range(len(residuals.schedule)) if draw not in writer.draws]


def finish_whole(residuals: ResidualSet, writer: CacheWriter) -> None:
    """Declare a cache finished, if it has every draw; then nothing of its parts is needed.

    Raises:
        CacheError: If draws are missing; the cache stays unfinished, with those that it has.
        StorageError: If the disk cannot be written.
    """
    missing = missing_draws(residuals, writer)
    if missing:
        raise CacheError(
            f"{len(missing)} of {len(residuals.schedule)} residuals are missing in {residuals.folder.name}: what a process "
            "has computed cannot be read. The others are kept. Run again when all processes see the same disk."
        )
    writer.finish()
    for part in parts_of(residuals.folder):
        remove_unused(part)


def waiting_for_another(residuals: ResidualSet, progress: PhaseProgress) -> Callable[[], None]:
    """Return a function that reports the progress of another process that is computing these residuals."""
    total = -(-len(residuals.schedule) // residuals.chunk_size)
    return lambda: progress(WAITING, min(num_shards(residuals.folder), total), total)


def _write_missing(residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, writer: CacheWriter) -> None:
    draws = missing_draws(residuals, writer)
    require_disk_space(residuals, dit, draws)
    chunks = [draws[start : start + residuals.chunk_size] for start in range(0, len(draws), residuals.chunk_size)]
    stored = FittedResponse.found(lambda name: writer.read(f"0/{name}"))
    fitted = stored or fitted_response(residuals, dit, progress)
    for number, chunk in enumerate(chunks):
        computed = compute_chunk(residuals, dit, chunk, _part_of(progress, number, len(chunks)), fitted)
        writer.write(records_of(residuals, computed, None if stored or number else fitted))
    finish_whole(residuals, writer)


def _part_of(progress: PhaseProgress, number: int, count: int) -> PhaseProgress:
    """Return a progress callback for part ``number`` of ``count`` equal parts."""
    return lambda phase, done, total: progress(phase, number * total + done, count * total)


def stored_latents(residuals: ResidualSet, progress: PhaseProgress) -> Latents | None:
    """Return the latents of a finished cache, each (C, H, W), or None if there is no finished cache.

    If another process is computing it, this waits.

    Raises:
        CacheError: If the cache is damaged; it is removed.
    """
    folder = residuals.folder
    with removed_if_damaged(lambda: remove_unused(folder)):
        with lock(folder, waiting_for_another(residuals, progress), shared=True):
            if not is_finished(folder):
                return None
            with closing(ResidualCache(folder, residuals.identity)) as cache:
                draws = range(len(residuals.schedule))
                # Reading all checks all. Copies, because a tensor as it is read keeps its whole file mapped.
                return joined(cache.read(draw)[_LATENT].clone() for draw in draws)


@contextmanager
def open_set(residuals: ResidualSet, run: MicroBatches, micro_batches: range) -> Iterator[OpenResiduals]:
    """Open a finished cache for a stretch; the next two micro-batches are read while one is trained on."""
    order = _order(residuals, run, micro_batches)
    with closing(ResidualCache(residuals.folder, residuals.identity)) as cache:
        # Fail now rather than after hours of training. Of several processes, each checks what it reads.
        cache.verify(None if run.processes == 1 else set(_order(residuals, run, micro_batches)))
        reference = Reference(*cache.require_first("reference"))
        fitted = FittedResponse.found(lambda name: (cache.first(name) or (0, None))[1])
        reading = threading.Lock()

        def read(draw: int) -> Residual:
            with reading:  # one thread at a time
                return cache.residual(draw)

        with prefetched(read, order, ahead=2 * run.batch_size) as residual:
            yield OpenResiduals(
                micro_batches,
                residual,
                reference,
                fitted.response if fitted else None,
                residuals.identity.residual_format,
                fitted.problem() if fitted else "",
                out_of_turn=read,
            )


def _order(residuals: ResidualSet, run: MicroBatches, micro_batches: range) -> Iterator[int]:
    return (draw for number in micro_batches for draw in run.draws_of(number, len(residuals.schedule)))

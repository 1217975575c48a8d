"""One set of residuals on disk, computed by several processes: each computes its share of the draws.

Draws pass the model one by one, so a draw's residual does not depend on who computes it. Each process writes a cache of
its own beside the shared one; at the end process 0 renames their shards into it and writes the manifest, if every draw
is there. Process 0 alone decides what is missing, because machines may see a shared disk differently. If the processes
are interrupted, the next ones, in whatever number, take over the finished shards and share out the rest.

A linear response is fitted on draws of the whole schedule, so it is left to process 0; the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from ..errors import BlockSkipError, TrainingError
from ..locks import lock
from ..model import SkippableDit
from ..residuals.cache import UNFINISHED, CacheWriter, is_finished
from ..residuals.cached_set import (
    adopt_parts,
    finish_whole,
    missing_draws,
    resumed_writer,
    waiting_for_another,
    write_cache,
)
from ..residuals.chunks import compute_chunk, records_of
from ..residuals.housekeeping import part_folder
from ..residuals.residual_set import PhaseProgress, ResidualSet, require_disk_space, wants_response
from .together import Together

SECONDS_TO_APPEAR = 30.0  # network file systems remember for as long that a file was not there


def write_cache_together(
    residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, together: Together
) -> None:
    """Compute and store the residuals of all draws, unless they are stored; all processes return when they are.

    Args:
        residuals: What to compute; its folder must be the same for all processes.
        dit: The model.
        progress: Called during the passes, and while waiting for other runs.
        together: The processes.

    Raises:
        InvalidInputError: If there is not enough disk space.
        StorageError: If the disk cannot be written.
        TrainingError: If another process cannot compute its share, has ended, or does not see the folder.
    """
    if wants_response(residuals) or together.size == 1:
        if together.rank == 0:
            write_cache(residuals, dit, progress)
        together.gathered("")
        return
    with ExitStack() as held:
        writer, missing = None, []
        if together.rank == 0:
            held.enter_context(lock(residuals.folder, waiting_for_another(residuals, progress)))
            writer = None if is_finished(residuals.folder) else _shared_writer(residuals)
            missing = missing_draws(residuals, writer) if writer else []
        missing = together.from_first(missing)
        if missing:
            own = missing[together.rank :: together.size]
            problems = together.gathered(_share_computed(residuals, dit, progress, own, together.rank))
            for rank, text in enumerate(problems):
                if text:
                    if writer:
                        adopt_parts(writer, residuals.folder)
                    raise TrainingError(f"Process {rank} could not compute its share of the residuals: {text}")
        problem = together.gathered(_put_together(residuals, writer) if writer else "")[0]
        if problem:
            raise TrainingError(problem)


def _shared_writer(residuals: ResidualSet) -> CacheWriter:
    """Return the writer of the shared cache, with everything that earlier processes have left."""
    writer = resumed_writer(residuals)
    writer.write_unfinished()  # so that the other processes can see it
    return writer


def _share_computed(
    residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, own: list[int], rank: int
) -> str:
    """Compute a process's share of what is missing, and return what went wrong, as a sentence."""
    if not _appears(lambda: (residuals.folder / UNFINISHED).is_file()):
        return f"It does not see the folder {residuals.folder}. All processes must see the same output folder."
    if not own:
        return ""
    folder = part_folder(residuals.folder, rank)
    try:
        with lock(folder, waiting_for_another(residuals, progress)):
            _write(residuals, dit, progress, own, CacheWriter(folder, residuals.identity))
    except BlockSkipError as error:
        return str(error)
    return ""


def _put_together(residuals: ResidualSet, writer: CacheWriter) -> str:
    """Take over what all processes have computed, finish the cache, and return what went wrong, as a sentence."""

    def everything() -> bool:
        if missing_draws(residuals, writer):
            adopt_parts(writer, residuals.folder)
        return not missing_draws(residuals, writer)

    try:
        _appears(everything)
        finish_whole(residuals, writer)
    except BlockSkipError as error:
        return str(error)
    return ""


def _appears(there: Callable[[], bool]) -> bool:
    """Wait for files that another machine has written: a shared disk may show them late."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (found := there()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _write(
    residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, draws: list[int], writer: CacheWriter
) -> None:
    if draws:
        require_disk_space(residuals, dit, draws)
    for start in range(0, len(draws), residuals.chunk_size):
        chunk = draws[start : start + residuals.chunk_size]

        def tell(phase: str, done: int, total: int, start: int = start, count: int = len(chunk)) -> None:
            progress(phase, start * total + done * count, len(draws) * total)

        writer.write(records_of(residuals, compute_chunk(residuals, dit, chunk, tell, None), None))

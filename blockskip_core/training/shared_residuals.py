"""One set of residuals on disk, computed by several processes: each computes its share of the draws.

Draws pass the model one by one, so a draw's residual does not depend on who computes it. Each process writes a cache of
its own beside the shared one; at the end process 0 renames their shards into it and writes the manifest. If the
processes are interrupted, the next ones, in whatever number, take over the finished shards and share out the rest.

A linear response is fitted on draws of the whole schedule, so it is left to process 0; the others wait.
"""

from __future__ import annotations

from contextlib import ExitStack

from ..errors import BlockSkipError, CacheError, TrainingError
from ..locks import lock
from ..model import SkippableDit
from ..residuals.cache import CacheWriter, is_finished, stored_draws
from ..residuals.cached_set import adopt_parts, resumed_writer, waiting_for_another, write_cache
from ..residuals.chunks import compute_chunk, records_of
from ..residuals.housekeeping import part_folder
from ..residuals.residual_set import PhaseProgress, ResidualSet, require_disk_space, wants_response
from .together import Together


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
        writer = None
        if together.rank == 0:
            held.enter_context(lock(residuals.folder, waiting_for_another(residuals, progress)))
            writer = None if is_finished(residuals.folder) else _shared_writer(residuals)
        if together.gathered("" if writer else "finished")[0] == "finished":
            return
        problem = _share_computed(residuals, dit, progress, together)
        problems = together.gathered(problem)
        if writer:
            adopt_parts(writer, residuals.folder)
        for rank, text in enumerate(problems):
            if text:
                raise TrainingError(f"Process {rank} could not compute its share of the residuals: {text}")
        if writer:
            writer.finish()
        together.gathered("")


def _shared_writer(residuals: ResidualSet) -> CacheWriter:
    """Return the writer of the shared cache, with everything that earlier processes have left."""
    writer = resumed_writer(residuals)
    writer.write_unfinished()  # so that the other processes can see it
    return writer


def _share_computed(residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, together: Together) -> str:
    """Compute this process's share of what is missing, and return what went wrong, as a sentence."""
    try:
        stored = stored_draws(residuals.folder, residuals.identity)
    except CacheError:
        return f"It does not see the folder {residuals.folder}. All processes must see the same output folder."
    missing = [draw for draw in range(len(residuals.schedule)) if draw not in stored]
    own = missing[together.rank :: together.size]
    folder = part_folder(residuals.folder, together.rank)
    try:
        with lock(folder, waiting_for_another(residuals, progress)):
            _write(residuals, dit, progress, own, CacheWriter(folder, residuals.identity))
    except BlockSkipError as error:
        return str(error)
    return ""


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

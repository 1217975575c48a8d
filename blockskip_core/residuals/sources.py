"""The sources of a training run's residuals: all from disk, a chunk at a time, or folded into each step.

``source`` explains the three. A :class:`ResidualSet` is what the precomputing node passes to the training node: small,
and complete enough that a source can compute whatever is missing.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from torch import Tensor

from ..blocks.replay import Residual
from ..data.micro_batches import MicroBatches
from ..data.schedule import TrainingSchedule
from ..errors import CacheError, InvalidInputError, StorageError
from ..files import unique_token
from ..locks import lock, remove_stale_locks, try_lock
from ..model import SkippableDit
from ..selection.selection import BlockSelection
from ..units import format_bytes
from .back_response import BACK_RESIDUALS, BackResidual, constant_part, fit_response
from .cache import (
    UNFINISHED,
    CacheIdentity,
    CacheWriter,
    ResidualCache,
    is_finished,
    num_shards,
    remove_cache,
    require_free_space,
)
from .format import RESIDUAL_FORMATS, ResidualShape, packed
from .precompute import Precomputed, precompute_residuals
from .prefetch import prefetched
from .source import OpenResiduals, Reference

logger = logging.getLogger(__name__)

Storage = Literal["disk", "chunked", "on the fly"]
STORAGES: tuple[str, ...] = get_args(Storage)
_ITEMSIZES = {"torch.float64": 8, "torch.float32": 4}  # bytes per number of a token stream; 2 for all others
KEPT_CACHES = 3  # how many of the newest finished caches to keep on disk

WAITING = "waiting for another process that computes the same residuals"
_SCRATCH = re.compile(r".*-chunk-[0-9a-f]{8}")  # one chunk of one run

Stretches = Iterator[AbstractContextManager[OpenResiduals]]
PhaseProgress = Callable[[str, int, int], None]  # (phase, done, total); may raise to interrupt


@dataclass(frozen=True, kw_only=True)
class ResidualSet:
    """Everything that determines a run's residuals.

    Attributes:
        schedule: The draws.
        latents: Clean latents of all draws in the model's own scale, shape (num_draws, C, H, W).
        selection: Blocks to be skipped.
        captions: Conditionings, opaque to this module.
        identity: What the residuals are computed from.
        storage: Where they are kept.
        chunk_size: Number of draws that go through the model's blocks together, and that are kept at a time if chunked.
        folder: This set's folder.
        family: The model family.
        back_residual: "constant" is the paper's; "linear" follows the LoRA to first order, see ``back_response``; both
            are ignored on the fly. "exact" requires a selection that freezes its last blocks and skips none of them.
        remarks: Anything odd about the pictures and captions, in sentences for the run's summary.
    """

    schedule: TrainingSchedule
    latents: Tensor = field(repr=False)
    selection: BlockSelection
    captions: Sequence[Any] = field(repr=False)
    identity: CacheIdentity
    storage: Storage
    chunk_size: int
    folder: Path
    family: str
    back_residual: BackResidual = "constant"
    remarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.back_residual not in BACK_RESIDUALS:
            raise InvalidInputError(
                f"back_residual must be one of {', '.join(BACK_RESIDUALS)}, got {self.back_residual!r}."
            )
        if self.back_residual == "exact" and self.selection.back:
            raise InvalidInputError(
                f"An exact back freezes the last blocks, but this selection skips {self.selection.back} of them."
            )
        if self.identity.residual_format not in RESIDUAL_FORMATS:
            raise InvalidInputError(
                f"residual_format must be one of {', '.join(RESIDUAL_FORMATS)}, got {self.identity.residual_format!r}."
            )
        if self.storage not in STORAGES:
            raise InvalidInputError(f"storage must be one of {', '.join(STORAGES)}, got {self.storage!r}.")
        if self.chunk_size < 1:
            raise InvalidInputError(f"chunk_size must be at least 1, got {self.chunk_size}.")

    def source(self, dit: SkippableDit, progress: PhaseProgress) -> DiskSource | ChunkedSource | FoldedSource:
        """Return the source for this set's storage."""
        if self.storage == "on the fly":
            return FoldedSource()
        kind = DiskSource if self.storage == "disk" else ChunkedSource
        return kind(self, dit, progress)


def residual_bytes(dit: SkippableDit, residuals: ResidualSet, draws: Sequence[int]) -> int:
    """Return the bytes that the residuals of ``draws`` will take: exact, apart from file headers and latents."""

    def shape(txt_tokens: int) -> ResidualShape:
        return ResidualShape(
            front=residuals.selection.front > 0,
            back=residuals.selection.back > 0,
            img_tokens=dit.image_tokens(*residuals.latents.shape[-2:]),
            txt_tokens=txt_tokens,
            width=dit.width,
            itemsize=_ITEMSIZES.get(residuals.identity.dtype, 2),
            form=residuals.identity.residual_format,
        )

    texts = Counter(dit.text_tokens(residuals.schedule[draw].caption) for draw in draws)
    stored = sum(shape(txt_tokens).num_bytes(count) for txt_tokens, count in texts.items())
    return stored + shape(0).response_bytes() * _wants_response(residuals)


def _wants_response(residuals: ResidualSet) -> bool:
    return residuals.back_residual == "linear" and residuals.selection.back > 0


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
        remove_old_caches(residuals.folder.parent, keep=KEPT_CACHES - 1, exclude=residuals.folder.name)
        writer = CacheWriter(residuals.folder, residuals.identity, resume=True)
        try:
            _write_missing(residuals, dit, progress, writer)
        finally:
            if not writer.draws:
                writer.discard()
    return True


def waiting_for_another(residuals: ResidualSet, progress: PhaseProgress) -> Callable[[], None]:
    """Return a function that reports the progress of another process that is computing these residuals."""
    total = -(-len(residuals.schedule) // residuals.chunk_size)
    return lambda: progress(WAITING, min(num_shards(residuals.folder), total), total)


def _write_missing(residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress, writer: CacheWriter) -> None:
    draws = [draw for draw in range(len(residuals.schedule)) if draw not in writer.draws]
    _require_room(residuals, dit, draws)
    chunks = [draws[start : start + residuals.chunk_size] for start in range(0, len(draws), residuals.chunk_size)]
    response = writer.read("0/response")
    for number, chunk in enumerate(chunks):
        part = _compute(residuals, dit, chunk, _part_of(progress, number, len(chunks)), response)
        writer.write(_records(residuals, part.computed, part.response if response is None else None))
        response = part.response
    writer.finish()


def stored_latents(residuals: ResidualSet, progress: PhaseProgress) -> Tensor | None:
    """Return the latents of a finished cache, shape (num_draws, C, H, W), or None if there is no finished cache.

    If another process is computing it, this waits.

    Raises:
        CacheError: If the cache is damaged; it is removed.
    """
    folder = residuals.folder
    with _removed_if_damaged(lambda: _remove_unused(folder)):
        with lock(folder, waiting_for_another(residuals, progress), shared=True):
            if not is_finished(folder):
                return None
            with closing(ResidualCache(folder, residuals.identity)) as cache:
                return torch.stack([cache.read(draw)["latent"] for draw in range(len(residuals.schedule))])


def require_room(residuals: ResidualSet, dit: SkippableDit) -> None:
    """Check that there is space for latents and residuals before anything is computed; latents may be on ``meta``.

    Raises:
        InvalidInputError: If not, with predicted and free bytes.
    """
    free = psutil.virtual_memory().available
    needed = 2 * residuals.latents.nbytes  # twice, because they are joined in the end
    if needed > free:
        raise InvalidInputError(
            f"The latents of {len(residuals.schedule)} training examples need {format_bytes(needed)} of host memory, "
            f"but {format_bytes(free)} are free. Use fewer training examples."
        )
    if residuals.storage != "on the fly":
        count = len(residuals.schedule) if residuals.storage == "disk" else residuals.chunk_size
        _require_room(residuals, dit, range(min(count, len(residuals.schedule))))


def _require_room(residuals: ResidualSet, dit: SkippableDit, draws: Sequence[int]) -> None:
    latents = len(draws) * residuals.latents[0].nbytes
    require_free_space(residuals.folder, residual_bytes(dit, residuals, draws) + latents)


@dataclass(frozen=True)
class _Part:
    """A chunk of draws in the form in which it is stored."""

    computed: Precomputed
    response: Tensor | None


def _compute(
    residuals: ResidualSet,
    dit: SkippableDit,
    draws: Sequence[int],
    progress: PhaseProgress,
    response: Tensor | None,
) -> _Part:
    """Compute a chunk; the response for all chunks is fitted on the first one."""
    computed = precompute_residuals(
        dit,
        residuals.schedule,
        residuals.latents,
        residuals.selection,
        draws,
        keep_entering=_wants_response(residuals),
        room=dit.room_for_blocks,
        progress=lambda done, total: progress("precomputing residuals", done, total),
    )
    if not computed.entering:
        return _Part(computed, None)
    if response is None:
        response = fit_response((h, _back(computed, draw)) for draw, h in computed.entering.items())
    return _Part(with_response(computed, response), response)


def with_response(computed: Precomputed, response: Tensor) -> Precomputed:
    """Return residuals with the linear response subtracted from their back part; see ``back_response``."""
    parts = {
        draw: Residual(residual.front, constant_part(_back(computed, draw), computed.entering[draw], response))
        for draw, residual in computed.residuals.items()
    }
    return Precomputed(parts, computed.reference, computed.entering)


def _back(computed: Precomputed, draw: int) -> Tensor:
    """Return a draw's back residual; it exists whenever there are tokens entering the back span."""
    back = computed.residuals[draw].back
    assert back is not None
    return back


def _records(residuals: ResidualSet, computed: Precomputed, response: Tensor | None) -> dict[int, dict[str, Tensor]]:
    records = {
        draw: {**packed(residual.tensors(), residuals.identity.residual_format), "latent": residuals.latents[draw]}
        for draw, residual in computed.residuals.items()
    }
    records[computed.reference.draw]["reference"] = computed.reference.denoised
    if response is not None:
        records[computed.reference.draw]["response"] = response
    return records


def _part_of(progress: PhaseProgress, number: int, count: int) -> PhaseProgress:
    """Return a progress callback for part ``number`` of ``count`` equal parts."""
    return lambda phase, done, total: progress(phase, number * total + done, count * total)


def remove_old_caches(parent: Path, *, keep: int, exclude: str = "") -> None:
    """Remove old caches below ``parent`` that no process uses, except the ``keep`` newest; nothing else is removed.

    ``exclude`` is the name of a cache that is always kept and not counted.
    """
    if not parent.is_dir():
        return
    try:
        own = [path for path in parent.iterdir() if is_finished(path) or (path / UNFINISHED).is_file()]
        own = [path for path in own if path.name != exclude and not _SCRATCH.fullmatch(path.name)]
        caches = sorted(own, key=lambda path: -path.stat().st_mtime)
    except OSError as error:  # another program may be removing them too
        logger.warning("BlockSkip: cannot remove old residuals: %s", error)
        return
    for path in caches[keep:]:
        if _remove_unused(path):
            logger.info("BlockSkip: removed the old residuals %s", path.name)
    remove_stale_locks(parent)


def _remove_unused(folder: Path) -> bool:
    """Remove a cache unless a process uses it; return whether it was removed."""
    try:
        held = try_lock(folder)
    except StorageError as error:
        logger.warning("BlockSkip: %s", error)
        return False
    if held is None:
        return False
    with held:
        remove_cache(folder)
    return True


@contextmanager
def _removed_if_damaged(remove: Callable[[], bool]) -> Iterator[None]:
    """Remove a cache that proves damaged, so that the next run computes it again, and say so in the error."""
    try:
        yield
    except CacheError as error:
        done = "They have been removed; run again to compute them."
        if not remove():
            done = "Another process still uses them: wait until it ends, and run again."
        raise CacheError(f"{error} {done}") from error


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
        with _removed_if_damaged(lambda: _remove_unused(folder)), self._reading():
            with _opened(self._residuals, run, micro_batches) as opened:
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
        self._response: Tensor | None = None

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield the run in stretches, each with the micro-batches of one chunk of draws.

        A run that starts within a chunk computes the rest of that chunk. The linear response is fitted on the first
        ``chunk_size`` draws, as with storage on disk; if the first stretch has other draws, those are computed extra.
        """
        remove_stale_locks(self._residuals.folder.parent)  # of chunks whose run was killed before creating their folder
        length = max(1, self._residuals.chunk_size // run.batch_size)
        if start < len(run) and _wants_response(self._residuals):
            fitted = list(range(min(self._residuals.chunk_size, len(self._residuals.schedule))))
            if start or self._draws_of(run, range(min(length, len(run)))) != fitted:
                self._response = _compute(self._residuals, self._dit, fitted, self._progress, None).response
        while start < len(run):
            end = min((start // length + 1) * length, len(run))
            yield self._chunk(run, range(start, end))
            start = end

    def _draws_of(self, run: MicroBatches, micro_batches: range) -> list[int]:
        num_draws = len(self._residuals.schedule)
        return list(dict.fromkeys(draw for batch in micro_batches for draw in run.draws_of(batch, num_draws)))

    @contextmanager
    def _chunk(self, run: MicroBatches, micro_batches: range) -> Iterator[OpenResiduals]:
        draws = self._draws_of(run, micro_batches)
        with _scratch_folder(self._residuals.folder) as folder:
            residuals = replace(self._residuals, folder=folder)
            _require_room(residuals, self._dit, draws)
            writer = CacheWriter(folder, residuals.identity)
            part = _compute(residuals, self._dit, draws, self._progress, self._response)
            self._response = part.response
            writer.write(_records(residuals, part.computed, part.response))
            writer.finish()
            with _removed_if_damaged(lambda: True), _opened(residuals, run, micro_batches) as opened:
                yield opened


@contextmanager
def _scratch_folder(base: Path) -> Iterator[Path]:
    """Provide a folder that no other run uses, and remove it at the end; also remove those of killed runs."""
    folder = base.with_name(f"{base.name}-chunk-{unique_token()}")
    with lock(folder, lambda: None):
        _remove_abandoned(folder.parent)
        try:
            yield folder
        finally:
            remove_cache(folder)


def _remove_abandoned(parent: Path) -> None:
    try:
        folders = [path for path in parent.iterdir() if _SCRATCH.fullmatch(path.name)]
    except OSError as error:
        logger.warning("BlockSkip: cannot remove residuals of a killed run: %s", error)
        return
    for path in folders:
        _remove_unused(path)


class FoldedSource:
    """Nothing stored: every step runs the whole network first."""

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield one stretch: the whole run, from ``start`` on."""
        if start < len(run):
            yield nullcontext(OpenResiduals(range(start, len(run)), None, None))


@contextmanager
def _opened(residuals: ResidualSet, run: MicroBatches, micro_batches: range) -> Iterator[OpenResiduals]:
    """Open a finished cache for a stretch; the next two micro-batches are read while one is trained on."""
    order = (draw for number in micro_batches for draw in run.draws_of(number, len(residuals.schedule)))
    with closing(ResidualCache(residuals.folder, residuals.identity)) as cache:
        cache.verify()  # fail now rather than after hours of training
        reference, response = Reference(*cache.require_first("reference")), cache.first("response")
        with prefetched(cache.residual, order, ahead=2 * run.batch_size) as residual:
            form = residuals.identity.residual_format
            yield OpenResiduals(micro_batches, residual, reference, response and response[1], form)

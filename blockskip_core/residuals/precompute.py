"""Residual feature pre-computation (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.3, Eq. 3), a few blocks at a time.

All draws of a chunk pass through one run of blocks before any passes through the next, so that only one run's weights
need to be on the device:

    for run of blocks:    load these blocks; everything else passes its tokens on
        for draw:         emit the tokens kept from the previous run, pass the blocks, keep the leaving tokens

A run is one block, or as many as the caller has room for: a block's input and output are the same, and fewer runs cost
fewer passes through the rest of the model.

The tokens leaving block n - 1 are the front's stored output. The additions of all blocks in the back span to the image
tokens are summed, and those to the text tokens too if kept blocks follow that read them; storing the sum of differences rather than last minus first avoids counting twice what a host adds
between blocks (control residuals). The output of the last block, run this way, is the full model's own output; for the
chunk's first draw it is kept, so that training can check itself against the full model without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks.replay import Replay, Residual
from ..blocks.stand_ins import PassThrough, Recording, RecordingBlock, ReplayFront
from ..blocks.weight_sharing import frozen_copy
from ..data.flow_matching import noisy_batch
from ..data.latents import Latents
from ..data.micro_batches import batches_of_equal_text
from ..data.schedule import TrainingSchedule
from ..errors import TrainingError
from ..model import Denoiser, SkippableDit, TokenStreams, plain_copy
from ..selection.selection import BlockSelection
from .source import Reference

Progress = Callable[[int, int], None]  # (done, total); may raise to interrupt


@dataclass(frozen=True)
class Precomputed:
    """Residuals of a chunk and the full model's output for its first draw.

    Attributes:
        residuals: Draw -> residual.
        reference: The full model's output for the chunk's first draw.
        entering: Draw -> image tokens that enter the back span, shape (1, N, D), if requested.
    """

    residuals: dict[int, Residual]
    reference: Reference
    entering: dict[int, Tensor]


@torch.inference_mode(False)  # hosts run nodes in inference mode, and training cannot use tensors created there
@torch.no_grad()
def precompute_residuals(
    dit: SkippableDit,
    schedule: TrainingSchedule,
    latents: Latents,
    selection: BlockSelection,
    draws: Sequence[int],
    *,
    batch_size: int = 1,
    keep_entering: bool = False,
    room: int = 0,
    progress: Progress | None = None,
) -> Precomputed:
    """Return the residuals of ``draws`` with the model's unchanged weights, and one reference output.

    Args:
        dit: The model.
        schedule: All draws.
        latents: Clean latents of all draws, each (C, H, W).
        selection: Blocks to be skipped.
        draws: Indices of the chunk's draws.
        batch_size: Number of draws that go through a block together.
        keep_entering: Whether to return the tokens entering the back span too.
        room: Bytes of blocks that may be loaded together; one block always is, however large.
        progress: Called with (block passes done, total).

    Raises:
        TrainingError: If a block's output is not finite.
    """
    draws = list(dict.fromkeys(draws))
    stream = _BlockStream(dit, schedule, latents, batch_size)
    kept = _Kept(selection, keep_entering)
    # Beyond the last skipped block only the reference has to go.
    cut = selection.back_span.stop if selection.back else selection.front
    for span in _runs_that_fit([block.num_bytes for block in dit.blocks], room, cut):
        passing = draws if span.stop <= cut else draws[:1]
        passed, reported = 0, span.start
        with closing(stream.through(span, kept.wanted & set(span), passing)) as batches:
            for batch, seen in batches:
                for index, recording in seen.items():
                    kept.take(index, batch, recording)
                passed += len(batch)
                done = span.start + len(span) * passed // len(passing)
                if progress and done > reported:
                    progress(done, len(dit.blocks))
                    reported = done
    residuals = {draw: kept.residual(draw) for draw in draws}
    reference = Reference(draws[0], stream.output[draws[0]])
    _require_finite(residuals, reference)
    return Precomputed(residuals, reference, kept.entering)


def _runs_that_fit(sizes: Sequence[int], room: int, cut: int) -> Iterator[range]:
    """Yield all blocks in runs of at most ``room`` bytes, or of one block; no run crosses ``cut``."""
    start, taken = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (taken + size > room or index == cut):
            yield range(start, index)
            start, taken = index, 0
        taken += size
    yield range(start, len(sizes))


class _Kept:
    """The tokens that are kept while draws pass the blocks, on the CPU, by draw.

    Attributes:
        wanted: Blocks whose tokens must be recorded.
        entering: Image tokens that enter the back span, if requested.
    """

    def __init__(self, selection: BlockSelection, keep_entering: bool) -> None:
        self._last_of_front = selection.front - 1
        self._with_text = selection.back_has_text
        self._back_span = selection.back_span
        self._first_of_back = selection.back_span.start if keep_entering and selection.back else None
        self.wanted = {self._last_of_front, *self._back_span}
        self.entering: dict[int, Tensor] = {}
        self._front: dict[int, TokenStreams] = {}
        self._back: dict[int, TokenStreams] = {}
        self._dtype: torch.dtype | None = None

    def take(self, index: int, batch: Sequence[int], recording: Recording) -> None:
        """Keep what is needed of a batch after block ``index``."""
        self._dtype = recording.leaving.img.dtype
        if index == self._last_of_front:
            self._front.update(zip(batch, recording.leaving.rows(), strict=True))
        if index == self._first_of_back:
            self.entering.update(zip(batch, _rows(recording.entering.img), strict=True))
        if index in self._back_span:
            for draw, added in zip(batch, self._added(recording).rows(), strict=True):
                self._back[draw] = self._back[draw].plus(added) if draw in self._back else added

    def residual(self, draw: int) -> Residual:
        """Return the residual of a draw, in the dtype of the streams."""
        back = self._back.get(draw)
        if back is None:
            return Residual(self._front.get(draw), None)
        back = back.map(lambda x: x.to(self._dtype))
        return Residual(self._front.get(draw), back.img, back.txt)

    def _added(self, recording: Recording) -> TokenStreams:
        """Return what a block adds to the tokens, in a dtype wide enough for summing over many blocks."""
        seen = (recording.leaving, recording.entering)
        dtype = torch.promote_types(recording.leaving.img.dtype, torch.float32)
        leaving, entering = ((x if self._with_text else x.without_text()).map(lambda x: x.to(dtype)) for x in seen)
        return leaving.minus(entering)


class _BlockStream:
    """The tokens of many draws, passed through the model run by run.

    Attributes:
        output: Draw -> the model's output, set by the last run.
    """

    def __init__(self, dit: SkippableDit, schedule: TrainingSchedule, latents: Latents, batch_size: int) -> None:
        self._dit = dit
        self._schedule = schedule
        self._latents = latents
        self._batch_size = batch_size
        self._tokens: dict[int, TokenStreams] = {}
        self.output: dict[int, Tensor] = {}

    def through(
        self, span: range, watched: Set[int], draws: Sequence[int]
    ) -> Generator[tuple[list[int], dict[int, Recording]]]:
        """Pass all ``draws`` through a run of blocks; yield (batch, watched block -> its recording)."""
        last = span.stop == len(self._dit.blocks)
        replay, seen = Replay(), {index: Recording() for index in sorted({*watched, *([] if last else [span[-1]])})}
        with self._dit.running(self._modules(span, replay, seen)) as denoise:
            for batch in batches_of_equal_text(draws, self._batch_key, self._batch_size):
                if span.start:
                    replay.front = TokenStreams.cat([self._tokens[draw] for draw in batch])
                output = self._denoise(denoise, batch)
                if last:
                    self.output.update(zip(batch, _rows(output), strict=True))
                else:
                    self._tokens.update(zip(batch, seen[span[-1]].leaving.rows(), strict=True))
                yield batch, {index: seen[index] for index in sorted(watched)}

    def _modules(self, span: range, replay: Replay, seen: Mapping[int, Recording]) -> dict[str, nn.Module]:
        """Return the stand-ins; blocks are always copied, because kernels may depend on a module's attributes."""
        modules: dict[str, nn.Module] = {}
        for position, block in enumerate(self._dit.blocks):
            if position in seen:
                modules[block.name] = RecordingBlock(self._dit.module(block.name), block.io, seen[position])
            elif position == span.start - 1:
                modules[block.name] = ReplayFront(block.io, replay)
            elif position in span:
                modules[block.name] = frozen_copy(self._dit.module(block.name))
            else:
                modules[block.name] = PassThrough(block.io)
        for name in (*self._dit.frozen_stem, *self._dit.trainable_head):
            modules[name] = frozen_copy(self._dit.module(name))
        return modules

    def _denoise(self, denoise: Denoiser, batch: Sequence[int]) -> Tensor:
        noisy, _, sigmas = noisy_batch(self._schedule, self._latents, batch)
        device = self._dit.device
        return denoise(noisy.to(device), sigmas.to(device), [self._schedule[draw].caption for draw in batch])

    def _batch_key(self, draw: int) -> Hashable:
        return self._latents[draw].shape, self._dit.batch_key(self._schedule[draw].caption)


def _rows(tensor: Tensor) -> list[Tensor]:
    """Return the rows of a batch, on the CPU, each with its own memory; the batch axis stays."""
    return [plain_copy(row) for row in tensor.split(1)]


def _require_finite(residuals: dict[int, Residual], reference: Reference) -> None:
    for draw, residual in residuals.items():
        named = residual.tensors()
        if draw == reference.draw:
            named["output"] = reference.denoised
        for name, tensor in named.items():
            if not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"The model's {name} tokens of training example {draw} are not finite. "
                    "Check the pictures and captions, or load the model in another precision."
                )

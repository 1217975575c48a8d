"""Residual feature pre-computation (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.3, Eq. 3), one block at a time.

All draws of a chunk pass through block i before any passes through block i + 1, so that one block's weights at a
time need be on the device:

    for block i:    put block i in, everything else passes its tokens on
        for draw:   emit the tokens kept from block i - 1, run, keep the tokens that leave

What leaves block n - 1 is the front's stored output. What each block of the back span adds to the image tokens is
summed up; storing the sum of differences rather than last minus first keeps what a host adds between blocks (control
residuals) from being counted twice. The output of the last block, run this way, is the full model's own output: that
of the chunk's first draw is kept, so that training can check itself against the full model without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block_selection import BlockSelection
from .draws import TrainingSchedule
from .errors import TrainingError
from .flow_matching import noisy_batch
from .residual_cache import Residual
from .stand_ins import PassThrough, Recording, RecordingBlock, Replay, ReplayFront
from .streams import Denoiser, SkippableDit, TokenStreams, batches_of_equal_text

Progress = Callable[[int, int], None]  # (done, total); may raise to interrupt


@dataclass(frozen=True)
class Reference:
    """The full model's clean estimate for one draw, shape (1, C, H, W)."""

    draw: int
    denoised: Tensor


@dataclass(frozen=True)
class Precomputed:
    """Residuals of a chunk and the full model's output for its first draw.

    Attributes:
        residuals: Draw -> residual.
        reference: Of the chunk's first draw.
        entering: Draw -> image tokens that enter the back span, shape (1, N, D), if they were asked for.
    """

    residuals: dict[int, Residual]
    reference: Reference
    entering: dict[int, Tensor]


@torch.inference_mode(False)  # hosts run their nodes under it, and training cannot use what is made there
@torch.no_grad()
def precompute_residuals(
    dit: SkippableDit,
    schedule: TrainingSchedule,
    latents: Tensor,
    selection: BlockSelection,
    draws: Sequence[int],
    *,
    batch_size: int = 1,
    keep_entering: bool = False,
    progress: Progress | None = None,
) -> Precomputed:
    """Return the residuals of ``draws`` with the model's weights as they are, and one reference output.

    Args:
        dit: The model.
        schedule: What the draws are.
        latents: Clean latents of all draws, shape (num_draws, C, H, W).
        selection: Blocks to be skipped.
        draws: Indices of a chunk.
        batch_size: Draws that go through a block together.
        keep_entering: Also return what enters the back span.
        progress: Called with (block passes done, total).

    Raises:
        TrainingError: If tokens that are not finite leave a block.
    """
    draws = list(dict.fromkeys(draws))
    stream = _BlockStream(dit, schedule, latents, batch_size)
    front: dict[int, TokenStreams] = {}
    back: dict[int, Tensor] = {}
    before: dict[int, Tensor] = {}
    for index in range(len(dit.blocks)):
        # With no back span only the reference has to go past the front.
        passing = draws if selection.back or index < selection.front else draws[:1]
        for draw, entering, leaving in stream.through(index, passing):
            if index == selection.front - 1:
                front[draw] = leaving
            if keep_entering and selection.back and index == selection.back_span.start:
                before[draw] = entering.img
            if index in selection.back_span:
                added = _difference(leaving, entering)
                back[draw] = back[draw] + added if draw in back else added
        if progress:
            progress(index + 1, len(dit.blocks))
    residuals = {draw: Residual(front.get(draw), _as_stored(back.get(draw), stream.dtype)) for draw in draws}
    reference = Reference(draws[0], stream.output[draws[0]])
    _require_finite(residuals, reference)
    return Precomputed(residuals, reference, before)


class _BlockStream:
    """Tokens of many draws on their way through the model, block by block.

    Attributes:
        output: Draw -> the model's output in the last pass; the full model's once the last block was passed.
    """

    def __init__(self, dit: SkippableDit, schedule: TrainingSchedule, latents: Tensor, batch_size: int) -> None:
        self._dit = dit
        self._schedule = schedule
        self._latents = latents
        self._batch_size = batch_size
        self._tokens: dict[int, TokenStreams] = {}
        self.output: dict[int, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""
        return next(iter(self._tokens.values())).img.dtype

    def through(self, index: int, draws: Sequence[int]) -> Iterator[tuple[int, TokenStreams, TokenStreams]]:
        """Run block ``index`` on all ``draws``; yield (draw, tokens in, tokens out), each with batch axis 1."""
        replay, recording = Replay(), Recording()
        last = index == len(self._dit.blocks) - 1
        with self._dit.running(self._modules(index, replay, recording)) as denoise:
            for batch in batches_of_equal_text(draws, self._text_length, self._batch_size):
                if index:
                    replay.front = TokenStreams.cat([self._tokens[draw] for draw in batch])
                output = self._denoise(denoise, batch)
                rows = zip(batch, recording.entering.rows(), recording.leaving.rows(), output.split(1), strict=True)
                for draw, entering, leaving, denoised in rows:
                    self._tokens[draw] = leaving
                    if last:
                        self.output[draw] = denoised.to("cpu", copy=True)
                    yield draw, entering, leaving

    def _modules(self, index: int, replay: Replay, recording: Recording) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for position, block in enumerate(self._dit.blocks):
            if position == index:
                modules[block.name] = RecordingBlock(self._dit.module(block.name), block.io, recording)
            elif position == index - 1:
                modules[block.name] = ReplayFront(block.io, replay)
            else:
                modules[block.name] = PassThrough(block.io)
        return modules

    def _denoise(self, denoise: Denoiser, batch: Sequence[int]) -> Tensor:
        noisy, _, sigmas = noisy_batch(self._schedule, self._latents, batch)
        device = self._dit.device
        return denoise(noisy.to(device), sigmas.to(device), [self._schedule[draw].caption for draw in batch])

    def _text_length(self, draw: int) -> int:
        return self._dit.text_length(self._schedule[draw].caption)


def _as_stored(back: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if back is None else back.to(dtype)


def _difference(leaving: TokenStreams, entering: TokenStreams) -> Tensor:
    """Return what a block adds to the image tokens, wide enough to be summed over many blocks."""
    dtype = torch.promote_types(leaving.img.dtype, torch.float32)
    return leaving.img.to(dtype) - entering.img.to(dtype)


def _require_finite(residuals: dict[int, Residual], reference: Reference) -> None:
    for draw, residual in residuals.items():
        named = residual.tensors()
        if draw == reference.draw:
            named["output"] = reference.denoised
        for name, tensor in named.items():
            if not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"The model's {name} tokens of draw {draw} are not finite. "
                    "Check the pictures and captions, or load the model in another precision."
                )

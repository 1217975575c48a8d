"""What replaces the skipped blocks in each arm: sources of residuals, all held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from blockskip_pack.blockskip_core.blocks.linear_response import LinearResponse
from blockskip_pack.blockskip_core.blocks.replay import Residual
from blockskip_pack.blockskip_core.blocks.stand_ins import PassThrough, Recording, RecordingBlock
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.data.schedule import TrainingSchedule
from blockskip_pack.blockskip_core.model import SkippableDit
from blockskip_pack.blockskip_core.residuals.back_response import fit_response
from blockskip_pack.blockskip_core.residuals.chunks import with_response
from blockskip_pack.blockskip_core.residuals.format import RESIDUAL_FORMATS, packed, unpacked
from blockskip_pack.blockskip_core.residuals.low_rank_regression import Moments, ridge_regression
from blockskip_pack.blockskip_core.residuals.precompute import Precomputed, precompute_residuals
from blockskip_pack.blockskip_core.residuals.source import OpenResiduals
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource
from blockskip_pack.blockskip_core.selection.selection import BlockSelection

PRECOMPUTE_BATCH = 16
RIDGE = 0.01  # of the responses by one matrix
FITTED_DRAWS = 64  # of the responses by one matrix
RESPONSES = ("diagonal", "linear", "banded")
Stretches = Iterator[AbstractContextManager[OpenResiduals]]


@dataclass
class Cached:
    """Residuals of the base model, computed once, with a constant or a response to a changed input.

    In int8 and fp8 they are constants, rounded like those in the cache on disk. "banded" is the response of the node's
    `linear`; "linear" and "diagonal" are one matrix for all noise levels, fitted on the first draws.
    """

    dit: SkippableDit
    schedule: TrainingSchedule
    latents: torch.Tensor
    selection: BlockSelection
    kind: str = "constant"

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield the whole run as one stretch."""
        yield nullcontext(self.opened(self.dit, range(start, len(run))))

    def opened(self, dit: SkippableDit, micro_batches: range) -> OpenResiduals:
        """Return residuals computed from the current weights of ``dit``."""
        computed = precompute_residuals(
            dit, self.schedule, self.latents, self.selection, range(len(self.schedule)),
            batch_size=PRECOMPUTE_BATCH, keep_entering=self.kind in RESPONSES,
        )  # fmt: skip
        response = None
        if self.kind in RESIDUAL_FORMATS:
            rounded = {draw: _rounded(residual, self.kind) for draw, residual in computed.residuals.items()}
            return OpenResiduals(micro_batches, rounded.__getitem__, computed.reference, form=self.kind)
        if self.kind in RESPONSES and self.selection.back:
            response = self._response(computed)
            if response is not None:
                computed = with_response(computed, self.schedule, response)
        return OpenResiduals(micro_batches, computed.residuals.__getitem__, computed.reference, response)

    def _response(self, computed: Precomputed) -> LinearResponse | None:
        pairs = {draw: (h, computed.residuals[draw].back) for draw, h in computed.entering.items()}
        if self.kind == "banded":
            sigmas = [draw.sigma for draw in self.schedule]
            return fit_response(sigmas, lambda draws: (pairs[draw] for draw in draws)).response
        fitted = [pairs[draw] for draw in list(pairs)[:FITTED_DRAWS]]
        return one_matrix(diagonal_response(fitted) if self.kind == "diagonal" else matrix_response(fitted))


def one_matrix(matrix: torch.Tensor) -> LinearResponse:
    """Return a response by one matrix for all noise levels, shape (D, D)."""
    width = len(matrix)
    whole = torch.eye(width, dtype=matrix.dtype)[None]
    return LinearResponse(torch.zeros(0, dtype=torch.float64), torch.zeros_like(matrix[:1]), matrix[None], whole)


def _rounded(residual: Residual, form: str) -> Residual:
    dtype = next(iter(residual.tensors().values())).dtype
    return Residual.from_tensors(unpacked(packed(residual.tensors(), form), dtype))


def matrix_response(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the ridge regression of what is added on the tokens that enter, as a matrix."""
    moments = Moments(*pairs[0])
    for h, d in pairs:
        moments.add(h, d)
    return ridge_regression(moments, RIDGE).to(pairs[0][0].dtype)


def diagonal_response(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the regression of every channel on itself only, as a matrix."""
    h, d = (torch.cat([pair[i].flatten(0, -2) for pair in pairs]).double() for i in (0, 1))
    h, d = h - h.mean(0), d - d.mean(0)
    return torch.diag((h * d).sum(0) / (1.01 * h.square().sum(0))).float()


@dataclass(kw_only=True)
class Refreshed(Cached):
    """Like :class:`Cached`, but recomputed from the current weights ``times`` times during the run."""

    current: Callable[[], SkippableDit]
    times: int

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield stretches of equal length; the first is the paper's."""
        length = -(-len(run) // (self.times + 1))
        for first in range(start, len(run), length):
            every = range(first, min(first + length, len(run)))
            opened = self.opened(self.current() if first else self.dit, every)
            yield nullcontext(opened if first == 0 else replace(opened, reference=None))


@dataclass
class Nothing:
    """No residuals: the first kept block sees the embedding, the head sees the last kept block."""

    dit: SkippableDit
    schedule: TrainingSchedule
    latents: torch.Tensor
    selection: BlockSelection

    def stretches(self, run: MicroBatches, start: int = 0) -> Stretches:
        """Yield the whole run as one stretch."""
        embedded = self._embedded()
        back = torch.zeros_like(embedded[0].img) if self.selection.back else None
        residuals = {draw: Residual(tokens, back) for draw, tokens in embedded.items()}
        yield nullcontext(OpenResiduals(range(start, len(run)), residuals.__getitem__, None))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _embedded(self) -> dict[int, Any]:
        """Return the tokens that enter the first block."""
        recording = Recording()
        first, *others = self.dit.blocks
        modules = {block.name: PassThrough(block.io) for block in others}
        modules[first.name] = RecordingBlock(self.dit.module(first.name), first.io, recording)
        tokens = {}
        with self.dit.running(modules) as denoise:
            for start in range(0, len(self.schedule), PRECOMPUTE_BATCH):
                draws = range(start, min(start + PRECOMPUTE_BATCH, len(self.schedule)))
                noisy, _, sigmas = noisy_batch(self.schedule, self.latents, draws)
                denoise(noisy, sigmas, [self.schedule[draw].caption for draw in draws])
                entering = recording.entering.map(torch.clone).rows()
                tokens.update(zip(draws, entering, strict=True))
        return tokens


def source_for(stand_in: str, current: Callable[[], SkippableDit], times: int, **parts: Any) -> Any:
    """Return the source of an arm; ``parts`` are dit, schedule, latents, selection."""
    if stand_in == "on the fly":
        return FoldedSource()
    if stand_in == "nothing":
        return Nothing(**parts)
    named = {
        "cached": "constant",
        "refreshed": "constant",
        "linear, refreshed": "linear",
        "new linear": "banded",
        "exact": "constant",
        "exact, 4-bit": "constant",
        "exact, int8": "constant",
    }
    kind = named.get(stand_in, stand_in)
    if "refreshed" in stand_in:
        return Refreshed(**parts, kind=kind, current=current, times=times)
    return Cached(**parts, kind=kind)

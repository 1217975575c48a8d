"""Computes chunks of draws together, in the form in which a cache stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..blocks.replay import Residual
from ..model import SkippableDit
from .back_response import constant_part, fit_response
from .format import packed
from .precompute import Precomputed, precompute_residuals
from .residual_set import PhaseProgress, ResidualSet, wants_response


@dataclass(frozen=True)
class Chunk:
    """A chunk of draws in the form in which it is stored."""

    computed: Precomputed
    response: Tensor | None


def compute_chunk(
    residuals: ResidualSet,
    dit: SkippableDit,
    draws: Sequence[int],
    progress: PhaseProgress,
    response: Tensor | None,
) -> Chunk:
    """Compute a chunk; the response for all chunks is fitted on the first one."""
    computed = precompute_residuals(
        dit,
        residuals.schedule,
        residuals.latents,
        residuals.selection,
        draws,
        keep_entering=wants_response(residuals),
        room=dit.room_for_blocks,
        progress=lambda done, total: progress("precomputing residuals", done, total),
    )
    if not computed.entering:
        return Chunk(computed, None)
    if response is None:
        response = fit_response((h, _back(computed, draw)) for draw, h in computed.entering.items())
    return Chunk(with_response(computed, response), response)


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


def records_of(residuals: ResidualSet, computed: Precomputed, response: Tensor | None) -> dict[int, dict[str, Tensor]]:
    """Return what a cache stores of a chunk: draw -> name -> tensor. A response that was stored before is None."""
    records = {
        draw: {**packed(residual.tensors(), residuals.identity.residual_format), "latent": residuals.latents[draw]}
        for draw, residual in computed.residuals.items()
    }
    records[computed.reference.draw]["reference"] = computed.reference.denoised
    if response is not None:
        records[computed.reference.draw]["response"] = response
    return records

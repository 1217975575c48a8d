"""Computes chunks of draws together, in the form in which a cache stores them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ..blocks.linear_response import LinearResponse
from ..blocks.replay import Residual
from ..data.schedule import TrainingSchedule
from ..model import SkippableDit
from .back_response import FittedResponse, constant_part, fit_response, noise_bands
from .format import packed
from .precompute import Precomputed, precompute_residuals
from .residual_set import PhaseProgress, ResidualSet, wants_response

logger = logging.getLogger(__name__)

COMPUTING = "computing residuals"
FITTING = "fitting the linear back residual"


def compute_chunk(
    residuals: ResidualSet,
    dit: SkippableDit,
    draws: Sequence[int],
    progress: PhaseProgress,
    fitted: FittedResponse | None,
) -> Precomputed:
    """Compute a chunk.

    Args:
        residuals: What to compute.
        dit: The model.
        draws: Indices of the chunk's draws.
        progress: Called with (phase, block passes done, total).
        fitted: From :func:`fitted_response`; if it has a response, the chunk's back residuals are its constant part.
    """
    response = fitted.response if fitted else None
    computed = _computed(
        residuals, dit, draws, response is not None,
        lambda done, total: progress(COMPUTING, done, total),
    )  # fmt: skip
    return computed if response is None else with_response(computed, residuals.schedule, response)


def fitted_response(residuals: ResidualSet, dit: SkippableDit, progress: PhaseProgress) -> FittedResponse | None:
    """Fit the linear response on draws from the whole schedule, or return None if the set does not want one.

    The draws pass the model here and again with their chunk, because what a chunk stores depends on the fit. At most
    ``chunk_size`` of them are in memory at a time.
    """
    if not wants_response(residuals):
        return None
    sigmas = [draw.sigma for draw in residuals.schedule]
    every = sum(len(band.fitted) + len(band.held_out) for band in noise_bands(sigmas))
    passed, blocks = 0, len(dit.blocks)

    def pairs(draws: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal passed
        for part in _parts(draws, residuals.chunk_size):

            def tell(done: int, total: int, before: int = passed, count: int = len(part)) -> None:
                progress(FITTING, before * total + done * count, every * total)

            computed = _computed(residuals, dit, part, True, tell)
            passed += len(part)
            yield from ((computed.entering[draw], _back(computed, draw)) for draw in part)

    fitted = fit_response(sigmas, pairs, before_each=lambda: progress(FITTING, passed * blocks, every * blocks))
    if fitted.problem():
        logger.warning("BlockSkip: %s", fitted.problem())
    else:
        logger.info("BlockSkip: %s", fitted.describe())
    return fitted


def _parts(draws: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (draws[start : start + size] for start in range(0, len(draws), size))


def _computed(
    residuals: ResidualSet, dit: SkippableDit, draws: Sequence[int], keep_entering: bool,
    progress: Callable[[int, int], None],
) -> Precomputed:  # fmt: skip
    return precompute_residuals(
        dit,
        residuals.schedule,
        residuals.latents,
        residuals.selection,
        draws,
        keep_entering=keep_entering,
        room=dit.room_for_blocks,
        progress=progress,
    )


def with_response(computed: Precomputed, schedule: TrainingSchedule, response: LinearResponse) -> Precomputed:
    """Return residuals with the linear response subtracted from their back part; see ``back_response``."""
    parts = {
        draw: Residual(
            residual.front,
            constant_part(_back(computed, draw), computed.entering[draw], response, schedule[draw].sigma),
            residual.back_txt,
        )
        for draw, residual in computed.residuals.items()
    }
    return Precomputed(parts, computed.reference, computed.entering)


def _back(computed: Precomputed, draw: int) -> Tensor:
    """Return a draw's back residual; it exists whenever there are tokens entering the back span."""
    back = computed.residuals[draw].back
    assert back is not None
    return back


def records_of(
    residuals: ResidualSet, computed: Precomputed, fitted: FittedResponse | None
) -> dict[int, dict[str, Tensor]]:
    """Return what a cache stores of a chunk: draw -> name -> tensor. A response that was stored before is None."""
    records = {
        draw: {**packed(residual.tensors(), residuals.identity.residual_format), "latent": residuals.latents[draw]}
        for draw, residual in computed.residuals.items()
    }
    records[computed.reference.draw]["reference"] = computed.reference.denoised
    if fitted is not None:
        records[computed.reference.draw].update(fitted.tensors())
    return records

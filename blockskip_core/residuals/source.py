"""The interface through which a training gets its residuals.

There are three sources:

    disk          all draws are precomputed and read from a cache
    chunked       K draws at a time are precomputed, trained on and dropped
    on the fly    every step first runs the whole network without gradients (the "folded" form): the residual of the
                  back span follows the current LoRA and nothing is stored, but all weights stay on the device
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..blocks.linear_response import LinearResponse
from ..blocks.replay import Residual
from ..data.micro_batches import MicroBatches
from .format import ResidualFormat


@dataclass(frozen=True)
class Reference:
    """The full model's clean estimate for one draw, shape (1, C, H, W)."""

    draw: int
    denoised: Tensor


@dataclass(frozen=True)
class OpenResiduals:
    """Residuals of a stretch of micro-batches.

    Attributes:
        micro_batches: The stretch.
        residual: Draw index -> residual; None in the folded form.
        reference: The full model's output for one of the draws, or None in the folded form.
        response: The back span's answer to its input, or None if the back residuals are constants.
        form: How the residuals are stored; eight bits make them inexact.
        problem: What users should know about them, as a sentence, or empty.
        out_of_turn: The same as ``residual`` for draws that are not requested in the run's order; None where that does not
            matter.
    """

    micro_batches: range
    residual: Callable[[int], Residual] | None
    reference: Reference | None
    response: LinearResponse | None = None
    form: ResidualFormat = "exact"
    problem: str = ""
    out_of_turn: Callable[[int], Residual] | None = None


class ResidualSource(Protocol):
    """Provides residuals, stretch by stretch."""

    def stretches(self, run: MicroBatches, start: int = 0) -> Iterator[AbstractContextManager[OpenResiduals]]:
        """Yield the stretches of a run in order, starting at a micro-batch; each is open while it is trained on."""
        ...

"""What quantisation changes in the model's predictions, once per training example, so that a LoRA does not learn it.

A LoRA that is trained on quantised weights learns its subject and, beside it, to undo the weights' error. In the model as
loaded there is no such error, and the second part does harm. So before its first step a run computes, for each example,

    offset      = clean estimate of the model as loaded - clean estimate of the quantised model    (both without the LoRA)

and in every step

    prediction  = clean estimate of the quantised model with the LoRA + offset

With a LoRA of zero the predictions are those of the model as loaded, up to rounding; gradients are those of the quantised
weights.

The paper (arXiv 2603.20755) does not quantise; what it does for a skipped block, a residual that is computed once per
example (Sec. 3.3), is done here for the error of a quantised one. An offset has the size of the example's latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks.skipping_model import SkippingModel
from ..data.flow_matching import noisy_batch
from ..data.latents import Latents
from ..data.schedule import TrainingSchedule
from ..model import Denoiser, SkippableDit, WeightPlacement
from ..residuals.residual_set import PhaseProgress
from ..residuals.source import OpenResiduals
from ..selection.selection import BlockSelection
from .self_check import check_against_full_model, require_explained

_ENOUGH = 4
"""Examples, of whose mean error something can be said; a single one may be off by more."""


@dataclass(frozen=True)
class Examples:
    """A run's training examples, and how they go through a model.

    Attributes:
        schedule, latents: The draws and their clean latents, each (C, H, W).
        selection: Blocks to be skipped.
    """

    schedule: TrainingSchedule
    latents: Latents
    selection: BlockSelection

    @torch.no_grad()
    def estimates(
        self,
        dit: SkippableDit,
        model: SkippingModel,
        denoise: Denoiser,
        residuals: OpenResiduals,
        draws: Sequence[int],
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield draws and their clean estimates, (C, H, W), on the CPU.

        They go through the model one at a time, so that an estimate does not depend on which others are wanted.

        Args:
            dit, model, denoise: The model, with its skipped blocks replaced, and its denoiser while it is running.
            residuals: What is replayed for the skipped blocks.
            draws: Draws that have residuals.
        """
        replayed = residuals.out_of_turn or residuals.residual
        for draw in draws:
            noisy, _, sigmas = (x.to(dit.device) for x in noisy_batch(self.schedule, self.latents, [draw]))
            captions = [self.schedule[draw].caption]
            call = lambda: denoise(noisy, sigmas, captions)  # noqa: B023, E731 - called in this turn of the loop
            model.replay(replayed, [draw], call)
            yield draw, call()[0].to("cpu", copy=True)


class QuantisationOffsets:
    """The offsets of a run's examples; those of a stretch of micro-batches are computed when it begins.

    Args:
        as_loaded: The model as loaded.
        progress: Shows the work; may raise to interrupt.
        apart: Gives contexts that are entered while the model as loaded is on the device, because that memory is not the
            training's.
    """

    def __init__(
        self,
        as_loaded: SkippableDit,
        progress: PhaseProgress = lambda phase, done, total: None,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._as_loaded, self._progress, self._apart = as_loaded, progress, apart
        self._estimates: dict[int, Tensor] = {}  # of the model as loaded, until the quantised one has run too
        self._offsets: dict[int, Tensor] = {}
        self._is_compared = self._is_judged = False

    def of(self, draws: Sequence[int]) -> Tensor:
        """Return the offsets of draws of one shape, (B, C, H, W), on the CPU in the dtype of the model's tokens."""
        return torch.stack([self._offsets[draw] for draw in draws])

    def run_as_loaded(
        self,
        examples: Examples,
        residuals: OpenResiduals,
        draws: Sequence[int],
        *,
        activation_bytes: int,
        weights: WeightPlacement,
    ) -> None:
        """Compute what the model as loaded predicts for the draws that have no offset yet; forget all other draws.

        Args:
            examples: The run's examples.
            residuals: What is replayed for the skipped blocks.
            draws: The draws that come next, each once.
            activation_bytes, weights: As for :meth:`SkippableDit.running`; weights need not fit, so "resident" is not used.

        Raises:
            TrainingError: If the model as loaded differs from the one whose output was recorded with the residuals.
        """
        wanted = set(draws)
        for known in (self._offsets, self._estimates):
            for draw in known.keys() - wanted:
                del known[draw]
        missing = [draw for draw in draws if draw not in self._offsets and draw not in self._estimates]
        if not missing:
            return
        dit = self._as_loaded
        model = SkippingModel(dit, examples.selection, checkpointed=False, folded=residuals.residual is None)
        placed: WeightPlacement = "streamed" if weights == "streamed" else "as fits"
        with self._apart(), torch.inference_mode(False), torch.no_grad():
            model.set_response(residuals.response, lambda draw: examples.schedule[draw].sigma)
            with dit.running(model.modules, activation_bytes=activation_bytes, weights=placed) as denoise:
                self._compare_once(examples, residuals, model, denoise)
                for done, (draw, estimate) in enumerate(examples.estimates(dit, model, denoise, residuals, missing), 1):
                    self._estimates[draw] = estimate
                    self._progress("examples predicted as loaded", done, len(missing))

    def run_quantised(
        self,
        examples: Examples,
        residuals: OpenResiduals,
        dit: SkippableDit,
        model: SkippingModel,
        denoise: Denoiser,
    ) -> float | None:
        """Compute the offsets of the draws for which only the model as loaded has been run.

        Args:
            examples, residuals: As for :meth:`run_as_loaded`.
            dit, model, denoise: The quantised model, its stand-ins, and its denoiser while it is running without the LoRA.

        Returns:
            The offsets' size, relative to what the model as loaded removes; None if there was nothing to compute.

        Raises:
            TrainingError: If the first of these sizes is more than the quantisation of these weights can explain.
        """
        draws = list(self._estimates)
        changed = removed = 0.0
        for draw, quantised in examples.estimates(dit, model, denoise, residuals, draws):
            estimate = self._estimates.pop(draw)
            offset = estimate - quantised
            noisy, _, _ = noisy_batch(examples.schedule, examples.latents, [draw])
            changed += offset.square().sum().item()
            removed += (noisy[0] - estimate).square().sum().item()
            self._offsets[draw] = offset.to(dit.dtype)
            self._progress("examples predicted quantised", len(draws) - len(self._estimates), len(draws))
        if not draws:
            return None
        size = (changed / max(removed, 1e-24)) ** 0.5
        if not self._is_judged and len(draws) >= _ENOUGH:
            require_explained(size, dit.known_error)
            self._is_judged = True
        return size

    def _compare_once(
        self, examples: Examples, residuals: OpenResiduals, model: SkippingModel, denoise: Denoiser
    ) -> None:
        """Compare the model as loaded with its recorded output, if there is one."""
        if residuals.reference is None or self._is_compared:
            return
        check_against_full_model(
            self._as_loaded, examples.schedule, examples.latents, model, denoise, residuals, residuals.reference
        )
        self._is_compared = True

"""What quantisation changes in the model's predictions, once per training example, so that a LoRA does not learn it.

A LoRA that is trained on quantised weights learns its subject and, beside it, to undo the weights' error. In the model as
loaded there is no such error, and the second part does harm. So before its first step a run computes, for each example,

    offset      = clean estimate of the model as loaded - clean estimate of the quantised model    (both without the LoRA)

and in every step

    prediction  = clean estimate of the quantised model with the LoRA + offset

With a LoRA of zero the predictions are those of the model as loaded; gradients are those of the quantised weights. In
BlockSkip's benchmark of quality, a LoRA on blocks that are all in 4-bit then learns as much as one on blocks in eight
bits.

The paper (arXiv 2603.20755) does not quantise; what it does for a skipped block, a residual that is computed once per
example (Sec. 3.3), is done here for the error of a quantised one. An offset has the size of the example's latent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks.skipping_model import SkippingModel
from ..data.flow_matching import noisy_batch
from ..data.latents import Latents
from ..data.micro_batches import batches_of_equal_text
from ..data.schedule import TrainingSchedule
from ..model import Denoiser, SkippableDit, WeightPlacement
from ..residuals.source import OpenResiduals
from ..selection.selection import BlockSelection
from .self_check import check_against_full_model, require_explained

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much; may raise to interrupt."""


@dataclass(frozen=True)
class Examples:
    """A run's training examples, and how they go through a model.

    Attributes:
        schedule, latents: The draws and their clean latents, each (C, H, W).
        selection: Blocks to be skipped.
        batch_size: Most draws that go through the model together.
    """

    schedule: TrainingSchedule
    latents: Latents
    selection: BlockSelection
    batch_size: int

    def estimates(
        self,
        dit: SkippableDit,
        model: SkippingModel,
        denoise: Denoiser,
        residuals: OpenResiduals,
        draws: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> dict[int, Tensor]:
        """Return the clean estimates of some draws, each (C, H, W), on the CPU in the dtype of the model's tokens.

        Args:
            dit, model, denoise: The model, with its skipped blocks replaced, and its denoiser while it is running.
            residuals: What is replayed for the skipped blocks.
            draws: Draws that have residuals.
            progress: Called with the number of draws that are done, and of all.
        """
        found: dict[int, Tensor] = {}
        batches = batches_of_equal_text(
            draws, lambda draw: (self.latents[draw].shape, dit.batch_key(self.schedule[draw].caption)), self.batch_size
        )
        with torch.no_grad():
            for batch in batches:
                noisy, _, sigmas = (x.to(dit.device) for x in noisy_batch(self.schedule, self.latents, batch))
                captions = [self.schedule[draw].caption for draw in batch]
                call = lambda: denoise(noisy, sigmas, captions)  # noqa: B023, E731 - called in this turn of the loop
                model.replay(residuals.residual, batch, call)
                found |= zip(batch, call().to(device="cpu", dtype=dit.dtype, copy=True), strict=True)
                progress(len(found), len(draws))
        return found


class QuantisationOffsets:
    """The offsets of a run's examples; those of a stretch of micro-batches are computed when it begins.

    Args:
        exact: The model as loaded.
        progress: Shows the work.
        apart: Gives contexts that are entered while the model as loaded is on the device, whose memory is not the
            training's.
    """

    def __init__(
        self,
        exact: SkippableDit,
        progress: Progress = lambda what, done, total: None,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._exact_dit, self._progress, self._apart = exact, progress, apart
        self._exact: dict[int, Tensor] = {}
        self._offsets: dict[int, Tensor] = {}
        self._is_checked = False

    def of(self, draws: Sequence[int]) -> Tensor:
        """Return the offsets of draws of one shape, (B, C, H, W), on the CPU."""
        return torch.stack([self._offsets[draw] for draw in draws])

    def run_exact(
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
        for known in (self._offsets, self._exact):
            for draw in known.keys() - wanted:
                del known[draw]
        missing = [draw for draw in draws if draw not in self._offsets and draw not in self._exact]
        if not missing:
            return
        dit = self._exact_dit
        model = SkippingModel(dit, examples.selection, checkpointed=False, folded=residuals.residual is None)
        placed: WeightPlacement = "streamed" if weights == "streamed" else "as fits"
        with self._apart(), torch.inference_mode(False), torch.no_grad():
            model.set_response(residuals.response, lambda draw: examples.schedule[draw].sigma)
            with dit.running(model.modules, activation_bytes=activation_bytes, weights=placed) as denoise:
                if residuals.reference is not None and not self._is_checked:
                    check_against_full_model(
                        dit, examples.schedule, examples.latents, model, denoise, residuals, residuals.reference
                    )
                    self._is_checked = True
                self._exact |= examples.estimates(
                    dit, model, denoise, residuals, missing,
                    lambda done, total: self._progress("examples predicted as loaded", done, total),
                )  # fmt: skip

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
            examples, residuals: As for :meth:`run_exact`.
            dit, model, denoise: The quantised model, its stand-ins, and its denoiser while it is running without the LoRA.

        Returns:
            The offsets' mean size, relative to what the model as loaded removes; None if there was nothing to compute.

        Raises:
            TrainingError: If that is more than the quantisation of these weights can explain. One draw alone may be off by more.
        """
        found = examples.estimates(
            dit, model, denoise, residuals, list(self._exact),
            lambda done, total: self._progress("examples predicted quantised", done, total),
        )  # fmt: skip
        sizes = []
        for draw, quantised in found.items():
            exact = self._exact.pop(draw)
            self._offsets[draw] = exact - quantised
            noisy, _, _ = noisy_batch(examples.schedule, examples.latents, [draw])
            removed = (noisy[0] - exact).norm().clamp_min(1e-12)
            sizes.append((self._offsets[draw].norm() / removed).item())
        if not sizes:
            return None
        mean = statistics.fmean(sizes)
        require_explained(mean, dit.known_error)
        return mean

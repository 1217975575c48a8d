"""The training loop of DiT-BlockSkip (arXiv 2603.20755, Sec. 3.3): settings in, LoRA out.

Only the kept blocks run. Where residuals come from is the :class:`ResidualSource`'s business:

    disk          all draws were precomputed; read from a cache
    chunked       K draws at a time are precomputed, trained on and dropped
    on the fly    every step first runs the whole network without gradients (the "folded" form): the residual of the
                  back span follows the current LoRA, nothing is stored, but all weights stay on the device

The loss is the model's own, unmodified: see ``flow_matching``.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .activation_budget import ActivationBudget
from .block_selection import BlockSelection
from .checkpoints import Checkpoints, TrainingState
from .draws import TrainingSchedule
from .errors import InvalidInputError, StorageError, TrainingError
from .flow_matching import LossWeighting, noisy_batch, velocity_loss
from .lora import LoraAdapters
from .optimizers import OptimizerName, build_optimizer, optimizer_state, restore_optimizer
from .precompute import Reference
from .residual_cache import Residual
from .residual_format import ResidualFormat
from .skipping_model import SkippingModel
from .streams import Denoiser, SkippableDit, WeightPlacement, batches_of_equal_text

logger = logging.getLogger(__name__)

_FLOAT16_LOSS_SCALE = (
    1024.0  # to begin with: gradients of a mean over a whole picture are near float16's smallest numbers
)
_MOST_OVERFLOWS = (
    20  # steps in a row whose gradient overflows in float16; each halves the scale, so this ends far below 1
)
_SCALER = "loss scale/"  # before the names of its numbers in a state
_OPTIMIZER = "optimizer/"  # before the names of its tensors in a state
_EIGHT_BIT_TOLERANCE = 0.1  # of what the model removes; measured on the tests' models: below 0.03

LearningRateSchedule = Literal["constant", "constant_with_warmup", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how fast.

    Attributes:
        steps: Optimiser steps.
        learning_rate: AdamW's. 1e-4 is what a third party reports for the paper.
        batch_size: Draws that go through the model together.
        accumulation: Micro-batches per optimiser step. The paper is reported to use 4.
        seed: Of the LoRA's initialisation.
        lr_schedule: A schedule of diffusers.
        warmup_steps: Only read by the schedules that warm up.
        max_grad_norm: Gradients are clipped to this norm; 0 turns clipping off.
        weight_decay: AdamW's.
        checkpointing: Recompute each kept block's activations in backward.
        activation_budget: Bytes that blocks may keep instead of recomputing; see ``activation_budget``. Only read with
            checkpointing.
        loss_weighting: A weighting of the SD3 paper, as diffusers computes it; "none" is the plain velocity loss.
        optimizer: See ``optimizers``.

    Raises:
        InvalidInputError: If a number is out of range or a name is not known.
    """

    steps: int
    learning_rate: float = 1e-4
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    checkpointing: bool = True
    activation_budget: float = 0.0
    loss_weighting: LossWeighting = "none"
    optimizer: OptimizerName = "AdamW"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**64:
            raise InvalidInputError(f"seed must lie between 0 and 2**64 - 1, got {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise InvalidInputError(f"learning_rate must be positive and finite, got {self.learning_rate}.")
        for name in ("warmup_steps", "max_grad_norm", "weight_decay", "activation_budget"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} must not be negative, got {getattr(self, name)}.")
        choices = {"lr_schedule": LearningRateSchedule, "loss_weighting": LossWeighting, "optimizer": OptimizerName}
        for name, names in choices.items():
            if getattr(self, name) not in get_args(names):
                raise InvalidInputError(
                    f"{name} must be one of {', '.join(get_args(names))}, got {getattr(self, name)!r}."
                )

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of the whole run."""
        return self.steps * self.accumulation

    def draws_of(self, micro_batch: int, num_draws: int) -> list[int]:
        """Return the draw indices of a micro-batch; a run longer than the schedule starts over."""
        start = micro_batch * self.batch_size
        return [index % num_draws for index in range(start, start + self.batch_size)]


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did.

    Attributes:
        step: Steps done, from 1.
        losses: Loss of each micro-batch.
        learning_rate: The one that was used.
        grad_norm: Before clipping.
        seconds: Wall time of the step.
    """

    step: int
    losses: tuple[float, ...]
    learning_rate: float
    grad_norm: float
    seconds: float

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return sum(self.losses) / len(self.losses)


@dataclass
class TrainingResult:
    """What a run left. Filled in as the run goes, so it is right whenever the run ends.

    Attributes:
        losses: Of every micro-batch.
        step_seconds: Of every optimiser step since the run was started or resumed.
        steps: Optimiser steps done.
        self_check: Relative difference between the skipping and the full model before the first step, or None.
        saved_bytes: Bytes that a micro-batch kept for its backward pass, parameters not counted: the larger of the first
            two, for the second is the first with an activation budget.
        resumed_at: Steps that an earlier run had done.
        overflows: Steps that were left out because a gradient overflowed in float16.
        problems: What went wrong without ending the run, in sentences.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    steps: int = 0
    self_check: float | None = None
    saved_bytes: int = 0
    resumed_at: int = 0
    overflows: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OpenResiduals:
    """Residuals of a stretch of micro-batches.

    Attributes:
        micro_batches: The stretch.
        residual: Draw index -> residual; None in the folded form.
        reference: The full model's output for one of the draws, or None in the folded form.
        response: J of ``back_response``, or None if the back residuals are constants.
        form: How the residuals were stored; eight bits make them inexact.
    """

    micro_batches: range
    residual: Callable[[int], Residual] | None
    reference: Reference | None
    response: Tensor | None = None
    form: ResidualFormat = "exact"


class ResidualSource(Protocol):
    """Hands out residuals, stretch by stretch."""

    def stretches(self, config: TrainingConfig, start: int = 0) -> Iterator[AbstractContextManager[OpenResiduals]]:
        """Yield the stretches of a run from a micro-batch on, in order; each is open while it is trained on."""
        ...


# Stand-ins by path -> the model running with them in place; a SkippableDit's `running` with the run's settings.
Place = Callable[[dict[str, torch.nn.Module]], AbstractContextManager[Denoiser]]


class Interlude(Protocol):
    """What is done between two steps while the model that is trained on is unloaded, e.g. sampling a picture."""

    def is_due(self, step: int) -> bool:
        """Whether it is wanted after so many steps; 0 is before the first."""
        ...

    def __call__(self, step: int) -> None:
        """Do it. What it takes of random numbers and memory it gives back."""
        ...


def estimated_step_bytes(
    *, num_kept: int, tokens: int, width: int, itemsize: int, batch_size: int, checkpointing: bool, lora_numbers: int
) -> int:
    """Return about how much memory a step takes beside the weights, for the host to keep free.

    A rule of thumb that asks for nothing but numbers; ``memory_counts`` counts exactly, and a test compares the two.
    The LoRA takes 16 bytes a number: itself, its gradient and AdamW's two moments. A block with LoRA on all its linear layers keeps about 25 numbers per token and unit of width for its backward
    (measured on FLUX blocks with this module's hooks: 23 in a single-stream, 25 in a double-stream block). With
    checkpointing every block keeps its input only, and one block at a time is recomputed.

    Args:
        num_kept: Blocks that are trained.
        tokens: Image and text tokens of one row, N + L.
        width: D.
        itemsize: Bytes per number.
        batch_size: Rows.
        checkpointing: Whether activations are recomputed.
        lora_numbers: Trainable numbers.
    """
    stream = tokens * width * itemsize * batch_size
    activations = (stream * num_kept + 25 * stream) if checkpointing else 25 * stream * num_kept
    return activations + 16 * lora_numbers


def train_lora(
    dit: SkippableDit,
    schedule: TrainingSchedule,
    latents: Tensor,
    selection: BlockSelection,
    source: ResidualSource,
    adapters: LoraAdapters,
    config: TrainingConfig,
    *,
    result: TrainingResult,
    on_step: Callable[[StepReport], None],
    activation_bytes: int = 0,
    weights: WeightPlacement = "as fits",
    checkpoints: Checkpoints | None = None,
    interlude: Interlude | None = None,
) -> None:
    """Train ``adapters`` in place.

    Args:
        dit: The model; it is left as it was.
        schedule, latents: The draws and their clean latents, shape (num_draws, C, H, W).
        selection: Blocks to be skipped.
        source: Where residuals come from.
        adapters: The LoRA; whenever this function is left, its tensors hold the last good state and are on the CPU.
        config: Settings.
        result: Filled in as the run goes.
        on_step: Called after every optimiser step; may raise to interrupt.
        activation_bytes: What the host should keep free beside the weights.
        weights: Where the host keeps the weights.
        checkpoints: Where the run goes on from, and where its states are kept; None starts anew and keeps none.
        interlude: Done between steps, outside the model's run.

    Raises:
        CheckpointError: If a state is that of another run.
        TrainingError: If a loss or gradient is not finite (before it is applied), the replayed model differs from
            the full model before the first step, or a kept block gets no gradient.
    """
    loop = _Loop(dit, schedule, latents, selection, adapters, config, result, on_step, checkpoints)
    place = functools.partial(dit.running, activation_bytes=activation_bytes, weights=weights)
    try:
        loop.resume()
        if interlude and interlude.is_due(result.steps):  # before the first step, or the one that a resumed run lacks
            loop.pause(interlude)
        for opening in source.stretches(config, start=result.steps * config.accumulation):
            with opening as residuals:
                for part in _between_interludes(residuals.micro_batches, config, interlude):
                    loop.run(residuals, part, place)
                    if interlude and _interlude_after(part, config, interlude):
                        loop.pause(interlude)
    finally:
        try:
            loop.save()
        finally:
            loop.release()


def _between_interludes(micro_batches: range, config: TrainingConfig, interlude: Interlude | None) -> Iterator[range]:
    """Cut a stretch after every step behind which there is an interlude."""
    start = micro_batches.start
    for end in range(start + 1, micro_batches.stop + 1):
        part = range(start, end)
        if end == micro_batches.stop or (interlude and _interlude_after(part, config, interlude)):
            yield part
            start = end


def _interlude_after(part: range, config: TrainingConfig, interlude: Interlude) -> bool:
    return part.stop % config.accumulation == 0 and interlude.is_due(part.stop // config.accumulation)


@dataclass(frozen=True)
class _Stretch:
    """What a stretch of micro-batches runs on."""

    model: SkippingModel
    denoise: Denoiser
    residuals: OpenResiduals
    budget: ActivationBudget


class _Loop:
    """A run: the optimiser and everything that outlives a stretch."""

    def __init__(
        self,
        dit: SkippableDit,
        schedule: TrainingSchedule,
        latents: Tensor,
        selection: BlockSelection,
        adapters: LoraAdapters,
        config: TrainingConfig,
        result: TrainingResult,
        on_step: Callable[[StepReport], None],
        checkpoints: Checkpoints | None,
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.dit, self.schedule, self.latents, self.selection = dit, schedule, latents, selection
        self.adapters, self.config, self.result, self.on_step = adapters, config, result, on_step
        self.checkpoints = checkpoints
        adapters.to(dit.device)
        self.optimizer = build_optimizer(
            config.optimizer,
            adapters.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.lr_factors = get_scheduler(
            config.lr_schedule,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        ).lr_lambdas
        self.scaler = torch.amp.GradScaler(
            dit.device.type, init_scale=_FLOAT16_LOSS_SCALE, enabled=dit.dtype == torch.float16
        )
        self.overflows_in_a_row = 0
        self.pending: list[float] = []
        self.num_counted = 0
        self.within_step = False  # left on by an error in the middle of an update: the tensors are of no step then
        self.started = time.perf_counter()
        self.paused = False

    def run(self, residuals: OpenResiduals, micro_batches: range, place: Place) -> None:
        """Train on some micro-batches of a stretch."""
        with self.running(residuals, place) as step_micro_batch:
            if self.paused:
                self.started, self.paused = time.perf_counter(), False
            for micro_batch in micro_batches:
                step_micro_batch(micro_batch)

    def pause(self, interlude: Interlude) -> None:
        """Keep the state, for the interlude may take much memory, and do it; its time belongs to no step."""
        self.save()
        interlude(self.result.steps)
        self.paused = True

    @contextmanager
    def running(self, residuals: OpenResiduals, place: Place) -> Iterator[Callable[[int], None]]:
        """Put the stand-ins and the LoRA in; give a function that trains one micro-batch."""
        model = SkippingModel(self.dit, self.selection, self.config.checkpointing, folded=residuals.residual is None)
        with ExitStack() as stack:
            # Grad mode is the caller's otherwise: hosts run their nodes under no_grad or inference_mode.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            model.set_response(residuals.response)
            denoise = stack.enter_context(place(model.modules))
            if residuals.reference is not None and self.result.self_check is None:
                self._check_against_full_model(model, denoise, residuals)
            stack.enter_context(self.adapters.attached(model.linears(), self.dit.weight_for_backward))
            budget = ActivationBudget(model.trained_blocks, self.config.activation_budget * self.config.checkpointing)
            stretch = _Stretch(model, denoise, residuals, budget)
            yield lambda micro_batch: self._micro_batch(stretch, micro_batch)

    def _micro_batch(self, stretch: _Stretch, micro_batch: int) -> None:
        draws = self.config.draws_of(micro_batch, len(self.schedule))
        total = 0.0
        for batch in batches_of_equal_text(draws, self._text_length, self.config.batch_size):
            with ExitStack() as stack:
                # Twice, for a budget is used from the second micro-batch on.
                counted = self.num_counted < 2 and stack.enter_context(stretch.model.counting_saved_bytes())
                loss = self._loss(stretch, batch) / len(draws)
            if counted:
                self.result.saved_bytes = max(self.result.saved_bytes, counted.total)
            value = loss.item()  # once: on a GPU every reading waits for what is still running
            self._require_finite(value, "loss", micro_batch)
            self.scaler.scale(loss / self.config.accumulation).backward()
            total += value
        self.num_counted += 1
        if micro_batch == 0:
            self._check_gradients()
        self.result.losses.append(total)
        self.pending.append(total)
        if len(self.pending) == self.config.accumulation:
            self._optimizer_step(micro_batch)

    def _loss(self, stretch: _Stretch, batch: Sequence[int]) -> Tensor:
        """Return the summed velocity loss of a batch."""
        noisy, clean, sigmas = (x.to(self.dit.device) for x in noisy_batch(self.schedule, self.latents, batch))
        captions = [self.schedule[draw].caption for draw in batch]
        stretch.model.replay(stretch.residuals.residual, batch, lambda: stretch.denoise(noisy, sigmas, captions))
        tokens = self.dit.image_tokens(*clean.shape[-2:]) + self.dit.text_tokens(captions[0])
        with stretch.budget.forward(len(batch) * tokens):
            denoised = stretch.denoise(noisy, sigmas, captions)
        return velocity_loss(denoised, clean, sigmas, self.config.loss_weighting).sum()

    def _optimizer_step(self, micro_batch: int) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), limit).item()
        self._require_no_overflow(norm, micro_batch)
        rate = self.optimizer.param_groups[0]["lr"]
        self.within_step = True
        self.scaler.step(self.optimizer)  # leaves the tensors alone if a gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.result.steps += 1
        self._set_rate(self.result.steps)
        self.within_step = False
        seconds = time.perf_counter() - self.started
        self.result.step_seconds.append(seconds)
        losses, self.pending = tuple(self.pending), []
        if self.checkpoints and self.checkpoints.is_due(self.result.steps):
            self.save()
        self.on_step(StepReport(self.result.steps, losses, rate, norm, seconds))
        self.started = time.perf_counter()

    def resume(self) -> None:
        """Go on from the newest state, if there is one."""
        state = self.checkpoints and self.checkpoints.newest(self.config.steps)
        if not state:
            return
        lora = {name: x for name, x in state.tensors.items() if not name.startswith(_OPTIMIZER)}
        moments = {name.removeprefix(_OPTIMIZER): x for name, x in state.tensors.items() if name not in lora}
        scaling = {name: x for name, x in state.numbers.items() if name.startswith(_SCALER)}
        numbers = {name: x for name, x in state.numbers.items() if name not in scaling}
        with torch.inference_mode(False):
            self.adapters.load_state_dict(lora)
            restore_optimizer(self.optimizer, moments, numbers)
        if scaling:
            self.scaler.load_state_dict({name.removeprefix(_SCALER): x for name, x in scaling.items()})
        self._set_rate(state.step)
        self.result.steps = self.result.resumed_at = state.step
        self.result.losses[:] = state.losses

    def save(self) -> None:
        """Write the state after the last whole step, if states are kept."""
        if not self.checkpoints or not self.result.steps or self.within_step:
            return
        tensors, numbers = optimizer_state(self.optimizer)
        numbers |= {_SCALER + name: x for name, x in self.scaler.state_dict().items()}
        tensors = self.adapters.state_dict() | {_OPTIMIZER + name: tensor for name, tensor in tensors.items()}
        whole = self.result.losses[: self.result.steps * self.config.accumulation]
        try:
            self.checkpoints.save(TrainingState(self.result.steps, whole, tensors, numbers))
        except StorageError as error:  # a run without states is better than no run
            logger.error("BlockSkip: %s", error)
            self.result.problems.append(str(error))

    def release(self) -> None:
        """Leave nothing of the run on the device, whoever still holds the LoRA."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.adapters.to(torch.device("cpu"))

    def _set_rate(self, step: int) -> None:
        """Set the learning rate of the step after so many; it follows from nothing else, so a run can resume anywhere."""
        for group, factor in zip(self.optimizer.param_groups, self.lr_factors, strict=True):
            group["lr"] = self.config.learning_rate * factor(step)

    def _check_against_full_model(self, model: SkippingModel, denoise: Denoiser, residuals: OpenResiduals) -> None:
        """Compare with the full model's recorded output, before the LoRA is attached: they must agree."""
        reference = residuals.reference
        noisy, _, sigmas = (x.to(self.dit.device) for x in noisy_batch(self.schedule, self.latents, [reference.draw]))
        with torch.no_grad():
            model.replay(residuals.residual, [reference.draw], None)
            denoised = denoise(noisy, sigmas, [self.schedule[reference.draw].caption]).cpu()
        removed = (noisy.cpu() - reference.denoised).norm().clamp_min(1e-12)
        difference = ((denoised - reference.denoised).norm() / removed).item()
        tolerance = _self_check_tolerance(residuals.residual(reference.draw), residuals.form) + self.dit.known_error
        if not difference <= tolerance:
            raise TrainingError(
                f"With nothing learned yet, the model with skipped blocks differs from the full model by "
                f"{difference:.2e} (at most {tolerance:.0e} was expected). Another node may have changed the model "
                "after Precompute Residuals; connect the same MODEL to both nodes."
                + (" Or quantisation costs this model too much; choose a finer one." if self.dit.known_error else "")
            )
        self.result.self_check = difference

    def _check_gradients(self) -> None:
        """Require a gradient in every kept block; B is zero at the start, so only its own gradient can be."""
        for index in self.selection.kept:
            block = self.dit.blocks[index].name + "."
            ups = [self.adapters.up(name) for name in self.adapters.names if name.startswith(block)]
            if ups and not any(up.grad is not None and up.grad.any() for up in ups):
                raise TrainingError(
                    f"Block {block[:-1]} got no gradient in the first step. This is a fault of the adapter for "
                    f"the {self.dit.family} family; please report it."
                )

    def _require_finite(self, value: float, what: str, micro_batch: int) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"The {what} is not finite in step {micro_batch // self.config.accumulation + 1}. The LoRA is left "
                f"as it was after step {self.result.steps}. Lower the learning rate, or load the model in bf16."
            )

    def _require_no_overflow(self, norm: float, micro_batch: int) -> None:
        """Let a step pass whose gradient overflowed in float16, as the scale is halved then; but not one after another."""
        if math.isfinite(norm) or not self.scaler.is_enabled():
            self.overflows_in_a_row = 0
            self._require_finite(norm, "gradient", micro_batch)
            return
        self.overflows_in_a_row += 1
        self.result.overflows += 1
        if self.overflows_in_a_row >= _MOST_OVERFLOWS:
            self._require_finite(norm, "gradient", micro_batch)

    def _text_length(self, draw: int) -> int:
        return self.dit.text_length(self.schedule[draw].caption)


def _self_check_tolerance(residual: Residual, form: ResidualFormat) -> float:
    """Return what rounding may do to the stored tokens, with room for other kernels at other batch sizes."""
    if form != "exact":
        return _EIGHT_BIT_TOLERANCE
    dtype = next((tensor.dtype for tensor in residual.tensors().values()), None)
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 2e-2)

"""The training loop of DiT-BlockSkip (arXiv 2603.20755, Sec. 3.3): settings in, LoRA out.

Only the kept blocks run. Residuals come from a ``residuals.source``. The loss is the model's own, unmodified: see
``flow_matching``.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.lora import LoraAdapters
from ..blocks.activation_budget import ActivationBudget
from ..blocks.skipping_model import SkippingModel
from ..data.flow_matching import noisy_batch, velocity_loss
from ..data.latents import Latents
from ..data.micro_batches import batches_of_equal_text
from ..data.schedule import TrainingSchedule
from ..errors import CheckpointError, TrainingError
from ..model import Denoiser, SkippableDit, WeightPlacement
from ..residuals.source import OpenResiduals, ResidualSource
from ..selection.selection import BlockSelection
from .checkpoints import Checkpoints, TrainingState
from .config import TrainingConfig
from .loss_scale import LossScale
from .moving_average import MovingAverage
from .observer import TrainingObserver
from .optimizers import build_optimizer, optimizer_state, restore_optimizer, step_size
from .quantisation_offsets import Examples, QuantisationOffsets
from .result import StepReport, TrainingResult
from .self_check import check_against_full_model, check_gradients
from .together import Together

_OPTIMIZER = "optimizer/"  # prefix of its tensors in a state
_AVERAGE = "average/"  # prefix of the moving average's tensors in a state


# Stand-ins by path -> the model running with them in place; a SkippableDit's `running` with the run's settings.
Place = Callable[[dict[str, torch.nn.Module]], AbstractContextManager[Denoiser]]


def train_lora(
    dit: SkippableDit,
    schedule: TrainingSchedule,
    latents: Latents,
    selection: BlockSelection,
    source: ResidualSource,
    adapters: LoraAdapters,
    config: TrainingConfig,
    *,
    result: TrainingResult,
    observers: Sequence[TrainingObserver] = (),
    activation_bytes: int = 0,
    weights: WeightPlacement = "as fits",
    checkpoints: Checkpoints | None = None,
    together: Together = Together(),  # noqa: B008 - it has no state
    offsets: QuantisationOffsets | None = None,
) -> None:
    """Train ``adapters`` in place.

    Args:
        dit: The model; left unchanged.
        schedule, latents: The draws and their clean latents, each (C, H, W); only draws of one shape go through the model
            together.
        selection: Blocks to be skipped.
        source: Where residuals come from.
        adapters: The LoRA; however this function ends, its tensors then hold the last good state, or with ``ema`` the
            average of all states up to it, and are on the CPU.
        config: Settings.
        result: Filled in during the run.
        observers: Called in this order, with ``ema`` while the LoRA holds its average; see
            :class:`~.observer.TrainingObserver`.
        activation_bytes: Bytes that the host should keep free in addition to the weights.
        weights: Where the host keeps the weights.
        checkpoints: The run's saved states, to resume from and to write; if None, the run starts from the beginning and
            saves no states.
        together: The processes that share the run; this one trains on its share of every step. Only process 0 saves
            states.
        offsets: If ``dit`` is quantised: undo what that changes in its predictions; see ``quantisation_offsets``.

    Raises:
        CheckpointError: If a state belongs to another run, or has not the average that this one needs.
        InvalidInputError: If the processes cannot share the micro-batches of a step equally.
        TrainingError: If a loss or gradient is not finite (before it is applied), the replayed model differs from
            the full model before the first step, a kept block gets no gradient, or another process has ended.
    """
    loop = _Loop(dit, schedule, latents, selection, adapters, config, result, observers, checkpoints, together, offsets)
    place = functools.partial(dit.running, activation_bytes=activation_bytes, weights=weights)
    try:
        loop.resume()
        for observer in observers:
            observer.started(result.steps)
        loop.pause_if_due()  # before the first step, or where an interrupted run should have paused
        for opening in source.stretches(loop.share, start=result.steps * loop.share.per_step):
            with opening as residuals:
                rest = residuals.micro_batches
                if offsets:
                    offsets.run_as_loaded(
                        loop.examples,
                        residuals,
                        loop.share.distinct_draws(rest, len(schedule)),
                        activation_bytes=activation_bytes,
                        weights=weights,
                    )
                    loop.paused = True  # this time must not count for a step
                while rest:
                    rest = loop.run(residuals, rest, place)
                    if not loop.pending:  # the step is complete
                        loop.pause_if_due()
    finally:
        try:
            loop.save()
        finally:
            loop.release()


@dataclass(frozen=True)
class _Stretch:
    """The objects that a stretch of micro-batches runs with."""

    model: SkippingModel
    denoise: Denoiser
    residuals: OpenResiduals
    budget: ActivationBudget


class _Loop:
    """A run: the optimiser and everything else that outlives a stretch."""

    def __init__(
        self,
        dit: SkippableDit,
        schedule: TrainingSchedule,
        latents: Latents,
        selection: BlockSelection,
        adapters: LoraAdapters,
        config: TrainingConfig,
        result: TrainingResult,
        observers: Sequence[TrainingObserver],
        checkpoints: Checkpoints | None,
        together: Together,
        offsets: QuantisationOffsets | None,
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.dit, self.schedule, self.latents, self.selection = dit, schedule, latents, selection
        self.adapters, self.config, self.result, self.observers = adapters, config, result, observers
        self.checkpoints, self.together, self.offsets = checkpoints, together, offsets
        self.examples = Examples(schedule, latents, selection)
        self.share = config.micro_batches.share_of(together.rank, together.size)
        adapters.to(dit.device)
        self.average = MovingAverage(adapters.parameters(), config.ema)
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
        self.loss_scale = LossScale(dit.device, dit.dtype)
        self.pending: list[float] = []
        self.num_counted = 0
        self.within_step = False  # still True after an error within an update, when the tensors belong to no step
        self.started = time.perf_counter()
        self.paused = False

    def run(self, residuals: OpenResiduals, micro_batches: range, place: Place) -> range:
        """Train on some micro-batches of a stretch, up to a step after which an observer is due; return the others."""
        if residuals.problem and residuals.problem not in self.result.problems:
            self.result.problems.append(residuals.problem)
        with self.running(residuals, place) as step_micro_batch:
            if self.paused:
                self.started, self.paused = time.perf_counter(), False
            for done, micro_batch in enumerate(micro_batches, 1):
                step_micro_batch(micro_batch)
                if not self.pending and self.due(self.result.steps):  # asked now: it may have become due meanwhile
                    return micro_batches[done:]
        return micro_batches[len(micro_batches) :]

    def due(self, step: int) -> list[TrainingObserver]:
        """Return the observers that want the model unloaded after ``step`` steps."""
        return [observer for observer in self.observers if observer.is_due(step)]

    def pause_if_due(self) -> None:
        """Let observers work if due, e.g. sample; the state is saved first, because that may run out of memory."""
        due = self.due(self.result.steps)
        if not due:
            return
        self.save()
        with self.average.shown():
            for observer in due:
                observer.between_steps(self.result.steps)
        self.paused = True  # this time must not count for a step

    @contextmanager
    def running(self, residuals: OpenResiduals, place: Place) -> Iterator[Callable[[int], None]]:
        """Put the stand-ins and the LoRA in place, and provide a function that trains one micro-batch."""
        model = SkippingModel(self.dit, self.selection, self.config.checkpointing, folded=residuals.residual is None)
        with ExitStack() as stack:
            # Set explicitly, because hosts run nodes under no_grad or inference_mode.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            model.set_response(residuals.response, lambda draw: self.schedule[draw].sigma)
            denoise = stack.enter_context(place(model.modules))
            self._check(model, denoise, residuals)
            stack.enter_context(self.adapters.attached(model.linears(), self.dit.weight_for_backward))
            budget = ActivationBudget(model.trained_blocks, self.config.activation_budget * self.config.checkpointing)
            stretch = _Stretch(model, denoise, residuals, budget)
            yield lambda micro_batch: self._micro_batch(stretch, micro_batch)

    def _check(self, model: SkippingModel, denoise: Denoiser, residuals: OpenResiduals) -> None:
        """Compare the model, without the LoRA, with the full one: in one example, or in all that get an offset."""
        if self.offsets:
            difference = self.offsets.run_quantised(self.examples, residuals, self.dit, model, denoise)
            if difference is not None:
                self.together.gathered("")  # other cards may take longer for this than a step may take
        elif residuals.reference is not None and self.result.self_check is None:
            difference = check_against_full_model(
                self.dit, self.schedule, self.latents, model, denoise, residuals, residuals.reference
            )
        else:
            return
        if self.result.self_check is None:
            self.result.self_check = difference

    def _micro_batch(self, stretch: _Stretch, micro_batch: int) -> None:
        draws = self.share.draws_of(micro_batch, len(self.schedule))
        total = 0.0
        for batch in batches_of_equal_text(draws, self._batch_key, self.config.batch_size):
            with ExitStack() as stack:
                # Counted twice, because a budget takes effect only from the second micro-batch on.
                counted = self.num_counted < 2 and stack.enter_context(stretch.model.counting_saved_bytes())
                loss = self._loss(stretch, batch) / len(draws)
            if counted:
                self.result.saved_bytes = max(self.result.saved_bytes, counted.total)
            value = loss.item()  # read only once: on a GPU every read waits for running kernels
            if self.together.size == 1:  # otherwise all processes are told at the end of the step, and end together
                self._require_finite(value, "loss", micro_batch)
            self.loss_scale.scaled(loss / self.config.accumulation).backward()
            total += value
        self.num_counted += 1
        if micro_batch == 0:
            check_gradients(self.dit, self.selection, self.adapters)
        self.result.losses.append(total)
        self.pending.append(total)
        if len(self.pending) == self.share.per_step:
            self._optimizer_step(micro_batch)

    def _loss(self, stretch: _Stretch, batch: Sequence[int]) -> Tensor:
        """Return the summed velocity loss of a batch."""
        noisy, clean, sigmas = (x.to(self.dit.device) for x in noisy_batch(self.schedule, self.latents, batch))
        captions = [self.schedule[draw].caption for draw in batch]
        stretch.model.replay(stretch.residuals.residual, batch, lambda: stretch.denoise(noisy, sigmas, captions))
        channels, rows, columns = clean.shape[1:]
        tokens = self.dit.image_tokens(rows, columns, channels) + self.dit.text_tokens(captions[0])
        with stretch.budget.forward(len(batch) * tokens):
            denoised = stretch.denoise(noisy, sigmas, captions)
        if self.offsets:
            denoised = denoised + self.offsets.of(batch).to(denoised)
        return velocity_loss(denoised, clean, sigmas, self.config.loss_weighting).sum()

    def _optimizer_step(self, micro_batch: int) -> None:
        self._exchange(micro_batch)
        self.loss_scale.unscale(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.parameters(), limit).item()
        if self.loss_scale.overflowed(norm):
            self.result.overflows += 1
        else:
            self._require_finite(norm, "gradient", micro_batch)
        rate = step_size(self.optimizer)
        self.within_step = True
        self.loss_scale.step(self.optimizer)  # does nothing if a gradient overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self.result.steps += 1
        self.average.update(self.result.steps)
        self._set_rate(self.result.steps)
        self.within_step = False
        seconds = time.perf_counter() - self.started
        self.result.step_seconds.append(seconds)
        losses, self.pending = tuple(self.pending), []
        if self.checkpoints and self.checkpoints.is_due(self.result.steps):
            self.save()
        report = StepReport(self.result.steps, losses, rate, norm, seconds)
        with self.average.shown():
            for observer in self.observers:
                observer.on_step(report)
        self.started = time.perf_counter()

    def _exchange(self, micro_batch: int) -> None:
        """Replace this process's losses and gradients of the step by those of all processes together."""
        if self.together.size == 1:
            return
        own = len(self.pending)
        self.pending = self.together.in_order(self.pending)
        self.result.losses[-own:] = self.pending
        self._require_finite(sum(self.pending), "loss", micro_batch)
        self.together.sum_gradients(self.adapters.parameters())

    def resume(self) -> None:
        """Continue from the newest state, if there is one.

        Raises:
            CheckpointError: If the state has not the average that this run needs.
            TrainingError: If the processes find different states.
        """
        self.together.gathered("")  # process 0 may have waited for another process that trained this run
        state = self.checkpoints and self.checkpoints.newest(self.config.steps)
        self.together.require_equal(
            str(state.step if state else 0),
            lambda rank, _first, _other: (
                f"Process {rank} finds another training state than process 0. All processes must see the same "
                "output folder."
            ),
        )
        if not state:
            return
        moments, average = _named(state.tensors, _OPTIMIZER), _named(state.tensors, _AVERAGE)
        lora = {name: x for name, x in state.tensors.items() if not name.startswith((_OPTIMIZER, _AVERAGE))}
        if bool(average) != bool(self.config.ema):
            raise CheckpointError(
                f"The training state of step {state.step} has {'an' if average else 'no'} average of the LoRA, and ema "
                f"is {self.config.ema:g}. Turn resume off."
            )
        numbers = self.loss_scale.restore(state.numbers)
        with torch.inference_mode(False):
            self.adapters.load_state_dict(average)
            self.average.restart()
            self.adapters.load_state_dict(lora)
            restore_optimizer(self.optimizer, moments, numbers)
        self._set_rate(state.step)
        self.result.steps = self.result.resumed_at = state.step
        self.result.losses[:] = state.losses

    def save(self) -> None:
        """Write the state after the last complete step, if states are kept."""
        if not self.checkpoints or not self.result.steps or self.within_step or self.together.rank:
            return
        tensors, numbers = optimizer_state(self.optimizer)
        numbers |= self.loss_scale.numbers()
        tensors = self.adapters.state_dict() | {_OPTIMIZER + name: tensor for name, tensor in tensors.items()}
        if self.config.ema:
            with self.average.shown():
                tensors |= {_AVERAGE + name: tensor for name, tensor in self.adapters.state_dict().items()}
        whole = self.result.losses[: self.result.steps * self.config.accumulation]
        state = TrainingState(self.result.steps, whole, tensors, numbers, self.config.steps)
        self.result.problems.extend(self.checkpoints.try_save(state))

    def release(self) -> None:
        """Free all of the run's memory on the device, even if the LoRA is still referenced."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.average.keep()
        self.adapters.to(torch.device("cpu"))

    def _set_rate(self, step: int) -> None:
        """Set the learning rate for the step after ``step`` steps; it depends on nothing else, so a run can resume."""
        for group, factor in zip(self.optimizer.param_groups, self.lr_factors, strict=True):
            group["lr"] = self.config.learning_rate * factor(step)

    def _require_finite(self, value: float, what: str, micro_batch: int) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"The {what} is not finite in step {micro_batch // self.share.per_step + 1}. The LoRA is kept "
                f"as it was after step {self.result.steps}. Lower the learning rate, or load the model in bf16."
            )

    def _batch_key(self, draw: int) -> Hashable:
        return self.latents[draw].shape, self.dit.batch_key(self.schedule[draw].caption)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

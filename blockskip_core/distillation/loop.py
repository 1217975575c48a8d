"""The distillation loop: examples in, trained adapters out.

Source: DDiT (arXiv 2602.16968, Eq. 1): the mean square of the difference of two velocities. In clean estimates, which is
what hosts give, that is ``(teacher - student) / sigma``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.flow_matching import velocity_loss
from ..data.micro_batches import batches_of_equal_text
from ..errors import TrainingError
from ..training.checkpoints import Checkpoints, TrainingState
from ..training.loss_scale import LossScale
from ..training.optimizers import build_optimizer, optimizer_state, restore_optimizer
from .distilled import Distilled
from .examples import Batch, Examples
from .settings import DistillationSettings
from .validation import Call, HeldOut, OnCall

HELD_OUT_LATENTS = 4
_IMPROVEMENT = 0.005  # relative; less counts as none
_OPTIMIZER, _BEST, _MEASURED = "optimizer/", "best/", "measured"


@dataclass
class DistillationResult:
    """The result of a training; filled in during it.

    Attributes:
        losses: Of every step.
        steps: Optimiser steps done.
        resumed_at: Of these, made by an earlier run.
        levels: Noise levels at which errors are measured, rising.
        untrained: Error by level of coarse calls with nothing trained or measured.
        measured: (step, error by level) of every measurement; the first is before the first step.
        best_step: Step of the adapters that are kept.
        stopped_early: Whether the error no longer fell.
        overflows: Number of steps skipped because a gradient overflowed in float16.
        seconds: Spent in steps since the run was started or resumed.
        problems: What went wrong without ending the run.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    resumed_at: int = 0
    levels: tuple[float, ...] = ()
    untrained: tuple[float, ...] = ()
    measured: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False
    overflows: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def best_errors(self) -> tuple[float, ...]:
        """Error by level of the adapters that are kept."""
        return dict(self.measured)[self.best_step]


def distill(
    model: Distilled,
    examples: Examples,
    settings: DistillationSettings,
    *,
    result: DistillationResult,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[DistillationResult], None] = lambda result: None,
    on_measuring: OnCall = lambda done, total: None,
) -> None:
    """Train a model's adapters in place; in the end they are those with the least held-out error.

    Args:
        model: The running model.
        examples: See ``examples``.
        settings: See ``settings``.
        result: Filled in during the run.
        checkpoints: The run's saved states, to resume from and to write.
        on_step: Called after every step and measurement; may raise to interrupt the run, whose state is then saved.
        on_measuring: Called within every measurement, before :func:`on_step`, with the calls of the model done and all of
            them, from 0; may raise as that. A measurement that is interrupted is made by the run that resumes.

    Raises:
        CheckpointError: If a state belongs to another run.
        TrainingError: If a loss or gradient is not finite (before it is applied) or a held-out error is not, or a trained
            tensor gets no gradient.
    """
    loop = _Loop(model, examples, settings, result, checkpoints)
    with torch.inference_mode(False), torch.enable_grad():
        loop.resume()
        try:
            loop.teach(on_measuring)  # after that, so that who is told of it knows the steps of earlier runs
            loop.measure_if_due()
            on_step(result)
            while result.steps < settings.steps and not result.stopped_early:
                loop.step()
                loop.measure_if_due()
                loop.save_if_due()
                on_step(result)
        finally:
            loop.save()
        model.load_state_dict(loop.best)


class _Loop:
    def __init__(
        self,
        model: Distilled,
        examples: Examples,
        settings: DistillationSettings,
        result: DistillationResult,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.model, self.examples, self.settings = model, examples, settings
        self.result, self.checkpoints = result, checkpoints
        self.optimizer = build_optimizer(
            "AdamW", model.parameters(), learning_rate=settings.learning_rate, weight_decay=0.0
        )
        self.loss_scale = LossScale(model.device, model.dtype)
        result.levels = examples.levels
        self.held_out: HeldOut  # set by teach()
        self.best: dict[str, Tensor] = model.state_dict()
        self.within_step = False

    def teach(self, on_measuring: OnCall) -> None:
        """Compute the teacher's answers to the held-out examples."""
        self.held_out = HeldOut(self.model, self.examples.held_out_batches(HELD_OUT_LATENTS), on_measuring)

    def step(self) -> None:
        """Make one optimiser step."""
        settings, started = self.settings, time.perf_counter()
        first = self.result.steps * settings.batch_size
        numbers = range(first, first + settings.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_after(self.result.steps)
        total = 0.0
        for chosen in batches_of_equal_text(numbers, self._text_length, settings.batch_size):
            batch = self.examples.batch(chosen)
            taught = self._taught(batch)  # before: the teacher is the model without what is attached
            with self.model.attached():
                loss = self._loss(batch, taught) / len(numbers)
                total += loss.item()
                self._require_finite(total, "loss")
                self.loss_scale.scaled(loss).backward()
        if self.result.steps == self.result.resumed_at:
            self.model.check_gradients()
        self.loss_scale.unscale(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm).item()
        if self.loss_scale.overflowed(norm):
            self.result.overflows += 1
        else:
            self._require_finite(norm, "gradient")
        self.within_step = True
        self.loss_scale.step(self.optimizer)  # does nothing if a gradient overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self.result.steps += 1
        self.result.losses.append(total)
        self.within_step = False
        self.result.seconds += time.perf_counter() - started

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor:
        """Return the teacher's clean estimates."""
        noisy, sigmas = self._on_device(batch)
        return self.model.teacher(noisy, sigmas, batch.captions).float()

    def _loss(self, batch: Batch, taught: Tensor) -> Tensor:
        """Return the summed loss of a batch."""
        noisy, sigmas = self._on_device(batch)
        return velocity_loss(self.model.student(noisy, sigmas, batch.captions).float(), taught, sigmas).sum()

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.noisy.to(self.model.device), batch.sigmas.to(self.model.device)

    def _text_length(self, number: int) -> int:
        return self.model.text_length(self.examples.caption_of(number))

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"The {what} is not finite in step {self.result.steps + 1}. Lower the learning rate, or load the model in "
                "bf16."
            )

    def measure_if_due(self) -> None:
        """Measure the held-out error before the first step, at intervals and after the last step."""
        step, measured = self.result.steps, self.result.measured
        if not self.result.untrained:
            self.result.untrained = self._errors(self.model.untrained)
        due = step % self.settings.validate_every == 0 or step == self.settings.steps
        if not due or (measured and measured[-1][0] == step):
            return
        errors = self._errors(self.model.student)
        measured.append((step, errors))
        if len(measured) == 1 or _mean(errors) < _mean(self.result.best_errors) * (1.0 - _IMPROVEMENT):
            self.result.best_step, self.best = step, self.model.state_dict()
        self._stop_if_no_longer_better()

    def _errors(self, call: Call) -> tuple[float, ...]:
        """Return the held-out error by level of a call of the model.

        Raises:
            TrainingError: If one is not finite; it is not kept then, so that no saved state has it.
        """
        errors = self.held_out.errors(call)
        if not all(map(math.isfinite, errors)):
            raise TrainingError(
                f"The held-out error is not finite after step {self.result.steps}. Load the model in bf16, or lower the "
                "learning rate."
            )
        return errors

    def _stop_if_no_longer_better(self) -> None:
        since = sum(step > self.result.best_step for step, _ in self.result.measured)
        self.result.stopped_early = 0 < self.settings.patience <= since

    def resume(self) -> None:
        """Continue from the newest state, if there is one."""
        state = self.checkpoints and self.checkpoints.newest(self.settings.steps)
        if not state:
            return
        parts = {prefix: _below(state.tensors, prefix) for prefix in (_OPTIMIZER, _BEST)}
        own = {name: x for name, x in state.tensors.items() if not name.startswith((_OPTIMIZER, _BEST))}
        numbers = self.loss_scale.restore(state.numbers)
        about: Mapping[str, Any] = numbers.pop(_MEASURED)
        self.model.load_state_dict(own)
        restore_optimizer(self.optimizer, parts[_OPTIMIZER], numbers)
        self.best = parts[_BEST]
        self.result.steps = self.result.resumed_at = state.step
        self.result.losses[:] = state.losses
        self.result.untrained = tuple(about["untrained"])
        self.result.measured[:] = [(step, tuple(errors)) for step, errors in about["measured"]]
        self.result.best_step, self.result.overflows = about["best_step"], about["overflows"]
        self._stop_if_no_longer_better()

    def save_if_due(self) -> None:
        """Write a state at the given interval."""
        if self.checkpoints and self.checkpoints.is_due(self.result.steps):
            self.save()

    def save(self) -> None:
        """Write the state after the last complete step, if states are kept."""
        if not self.checkpoints or not self.result.steps or self.within_step:
            return
        tensors, numbers = optimizer_state(self.optimizer)
        numbers |= self.loss_scale.numbers()
        result = self.result
        about = {
            "untrained": result.untrained, "measured": result.measured, "best_step": result.best_step,
            "overflows": result.overflows,
        }  # fmt: skip
        own = self.model.state_dict()
        own |= {_OPTIMIZER + name: tensor for name, tensor in tensors.items()}
        own |= {_BEST + name: tensor for name, tensor in self.best.items()}
        planned = result.steps if result.stopped_early else self.settings.steps
        state = TrainingState(result.steps, result.losses, own, numbers | {_MEASURED: about}, planned)
        result.problems.extend(self.checkpoints.try_save(state))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _mean(errors: Sequence[float]) -> float:
    return sum(errors) / len(errors)

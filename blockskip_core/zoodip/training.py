"""The training loop of ZOODiP (arXiv 2503.14868): perturb the word, compare losses, move the word.

The word is kept in float32, and every perturbed word is computed from it. Directions and examples are functions of
(seed, step), so a training state is the word, Adam's moments, the subspace and the perturbation, which may have been
measured, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.checkpoints import Checkpoints, TrainingState
from ..training.observer import TrainingObserver
from ..training.result import StepReport, TrainingResult
from .adam import Adam
from .directions import directions
from .estimators import estimator, published_divisor
from .examples import ExampleSchedule
from .settings import WordSettings
from .signal import Losses, require_finite
from .subspace import SubspaceGradient
from .word import WordLayout

_ADAM, _SUBSPACE, _WORD, _PERTURBATION = "adam/", "subspace/", "word", "perturbation"


@dataclass
class WordResult(TrainingResult):
    """The result of a run so far; ``losses`` has one entry per step, the mean over the words of the step.

    Attributes:
        forwards: Forward passes of the steps since the run was started or resumed.
    """

    forwards: int = 0


class WordTraining:
    """A run that learns one word.

    Args:
        losses: The loss of words on an example.
        layout: The word's shape.
        first: The word at the start, shape (layout.numbers,).
        examples: The examples.
        settings: Settings.
        result: Filled in during the run.
        checkpoints: Training states to resume from and to write; None starts from the beginning and writes none.

    Attributes:
        word: The word, shape (numbers,), float32 on the CPU; the last good one, however the run ends.
        perturbation: That of the settings, or of the state that the run resumed from. May be set before the first step.
    """

    def __init__(
        self, losses: Losses, layout: WordLayout, first: Tensor, examples: ExampleSchedule, settings: WordSettings, *,
        result: WordResult, checkpoints: Checkpoints | None = None,
    ) -> None:  # fmt: skip
        self._losses, self._layout, self._examples, self._settings = losses, layout, examples, settings
        self._result, self._checkpoints = result, checkpoints
        self._estimator = estimator(settings.estimator)
        self._adam = Adam(layout.numbers, settings.epsilon)
        self._subspace = SubspaceGradient(layout.numbers, settings.subspace_every, settings.subspace_share)
        self.word = first.detach().to("cpu", torch.float32).clone()
        self.perturbation = settings.perturbation

    @property
    def num_removed(self) -> int:
        """Number of directions that the subspace removes at present."""
        return self._subspace.num_removed

    def resume(self) -> None:
        """Continue from the newest training state, if there is one.

        Raises:
            CheckpointError: If a state belongs to another run.
        """
        state = self._checkpoints.newest(self._settings.steps) if self._checkpoints else None
        if state is None:
            return
        self.word = state.tensors[_WORD].clone()
        self.perturbation = state.numbers.get(_PERTURBATION, self.perturbation)  # earlier versions wrote none
        self._adam.restore(_below(_ADAM, state.tensors), state.step)
        self._subspace.restore(_below(_SUBSPACE, state.tensors))
        self._result.losses[:] = state.losses
        self._result.steps = self._result.resumed_at = state.step

    @torch.no_grad()
    def run(self, observers: Sequence[TrainingObserver] = ()) -> None:
        """Make the remaining steps. Any exception of an observer ends the run; the state so far is saved first.

        Raises:
            TrainingError: If a loss is not finite, before it changes the word.
        """
        for observer in observers:
            observer.started(self._result.steps)
        try:
            self._pause_if_due(observers)
            while self._result.steps < self._settings.steps:
                report = self._step(self._result.steps)
                if self._checkpoints and self._checkpoints.is_due(report.step):
                    self._save()
                for observer in observers:
                    observer.on_step(report)
                self._pause_if_due(observers)
        finally:
            self._save()

    def _pause_if_due(self, observers: Sequence[TrainingObserver]) -> None:
        """Let observers work if due, e.g. sample; the state is saved first, because that may run out of memory."""
        due = [observer for observer in observers if observer.is_due(self._result.steps)]
        if due:
            self._save()
        for observer in due:
            observer.between_steps(self._result.steps)

    def _save(self) -> None:
        """Save the state after the last step, if states are kept."""
        if self._checkpoints and self._result.steps:
            told = self._result.problems
            told.extend(problem for problem in self._checkpoints.try_save(self._state()) if problem not in told)

    def _step(self, step: int) -> StepReport:
        started, settings = time.perf_counter(), self._settings
        drawn = directions(settings.seed, step, settings.directions, self._layout.numbers)
        points = self._estimator.points(self.word, self.perturbation * self._layout.sizes * drawn)
        losses = self._losses(points, self._examples[step]).double().cpu()
        require_finite(losses, f"of step {step + 1}")
        gradient = self._subspace.project(self._estimator.gradient(losses, drawn, self.perturbation))
        left = self._layout.numbers - self._subspace.num_removed
        gradient = gradient / published_divisor(left, settings.directions)
        rate = settings.step_size_at(step)
        self.word = self.word - rate * self._layout.sizes * self._adam.direction(gradient)
        self._subspace.add(self.word)
        return self._reported(losses, rate, gradient, time.perf_counter() - started)

    def _reported(self, losses: Tensor, rate: float, gradient: Tensor, seconds: float) -> StepReport:
        result, loss = self._result, losses.mean().item()
        result.steps += 1
        result.forwards += len(losses)
        result.losses.append(loss)
        result.step_seconds.append(seconds)
        return StepReport(result.steps, (loss,), rate, gradient.norm().item(), seconds)

    def _state(self) -> TrainingState:
        tensors = {_WORD: self.word.clone()}
        tensors |= {_ADAM + name: tensor for name, tensor in self._adam.state().items()}
        tensors |= {_SUBSPACE + name: tensor for name, tensor in self._subspace.state().items()}
        numbers = {_PERTURBATION: self.perturbation}
        return TrainingState(self._result.steps, list(self._result.losses), tensors, numbers, self._settings.steps)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

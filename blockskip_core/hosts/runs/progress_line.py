"""The line of text that follows a run, on a node or on a command line."""

from __future__ import annotations

from datetime import timedelta

from ...training.observer import TrainingObserver
from ...training.result import StepReport
from ...units import format_bytes
from .outcome import RunOutcome
from .prepare import PreparedRun
from .view import RunProgress


class ProgressLine(TrainingObserver):
    """Shows each step. It is the last observer, because Cancel ends a run here."""

    def __init__(self, run: PreparedRun, outcome: RunOutcome, progress: RunProgress) -> None:
        self._steps, self._outcome, self._progress = run.request.steps, outcome, progress

    def on_step(self, step: StepReport) -> None:
        """Show a step."""
        left, peak = time_left(self._outcome, self._steps), format_bytes(self._outcome.memory.peak)
        detail = f"loss {step.loss:.4f} · {_pace(self._outcome):.2f} s/step · {left} left · peak {peak}"
        self._progress("training step", step.step, self._steps, detail)


def time_left(outcome: RunOutcome, steps: int) -> timedelta:
    """Return how long the rest will take at the pace so far, in whole seconds."""
    return timedelta(seconds=round(_pace(outcome) * (steps - outcome.result.steps)))


def _pace(outcome: RunOutcome) -> float:
    seconds = outcome.result.step_seconds
    return sum(seconds) / len(seconds)

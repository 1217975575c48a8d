"""What the user sees during a run: the live chart, and the node's progress bar and line of text."""

from __future__ import annotations

from datetime import timedelta

from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.training.result import StepReport
from ...blockskip_core.units import format_bytes
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress
from .figures import mean
from .outcome import RunOutcome
from .prepare import PreparedRun

STEPS_OF_PACE = 20
"""Number of latest steps over which the chart averages the time per step."""


class RunChart(TrainingObserver):
    """Puts each step on the live chart, with the memory use at that time."""

    def __init__(self, run: PreparedRun, outcome: RunOutcome, chart: LiveChart) -> None:
        self._config, self._outcome, self._chart = run.request.config, outcome, chart
        self._resumes = run.request.resume

    def on_step(self, step: StepReport) -> None:
        """Show a step, and before the first one the steps of the interrupted run."""
        memory, seconds = self._outcome.memory, self._outcome.result.step_seconds
        memory.sample()
        if step.step == self._outcome.result.resumed_at + 1:
            self._show_earlier()
        self._chart.step(
            step.step,
            self._config.steps,
            step.loss,
            step.learning_rate,
            seconds_per_step=mean(seconds[-STEPS_OF_PACE:]),
            seconds_left=time_left(self._outcome, self._config.steps).total_seconds(),
            memory_now=memory.now,
            memory_peak=memory.peak,
            memory_of=memory.what,
        )

    def run_ended(self) -> None:
        """Sample the memory once more; show earlier steps if this run made none."""
        self._outcome.memory.sample()
        if self._outcome.result.resumed_at == self._outcome.result.steps:
            self._show_earlier()

    def saved(self) -> None:
        """Show what the run has saved, also if it ends early."""
        outcome = self._outcome
        path, summary = outcome.path if outcome.saved else None, outcome.summary_path
        self._chart.saved(path, summary, resumes=self._resumes, problems=outcome.problems)

    def _show_earlier(self) -> None:
        size, losses = self._config.accumulation, self._outcome.result.losses
        ends = range(size, self._outcome.result.resumed_at * size + 1, size)
        self._chart.earlier([sum(losses[end - size : end]) / size for end in ends], self._config.steps)


class ProgressLine(TrainingObserver):
    """Shows each step on the node. It is the last observer, because Cancel ends a run here."""

    def __init__(self, run: PreparedRun, outcome: RunOutcome, progress: NodeProgress) -> None:
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

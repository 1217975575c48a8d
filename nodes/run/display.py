"""The live chart of a run."""

from __future__ import annotations

from ...blockskip_core.hosts.runs.figures import mean
from ...blockskip_core.hosts.runs.outcome import RunOutcome
from ...blockskip_core.hosts.runs.prepare import PreparedRun
from ...blockskip_core.hosts.runs.progress_line import time_left
from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.training.result import StepReport
from ..page.live_chart import LiveChart

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

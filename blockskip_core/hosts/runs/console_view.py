"""A run on the command line: a line of text for its steps."""

from __future__ import annotations

from collections.abc import Sequence

from ...training.observer import TrainingObserver
from ...training.result import StepReport
from .outcome import RunOutcome
from .prepare import PreparedRun
from .progress_line import ProgressLine
from .view import RunProgress, RunView


class ConsoleView(RunView):
    """Shows each step as the trainer's node does under its bar.

    Args:
        progress: Shows it.
    """

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress

    def observers(self, run: PreparedRun, outcome: RunOutcome, training_peak: int) -> Sequence[TrainingObserver]:
        """Return the line of text."""
        return [SampledMemory(outcome), ProgressLine(run, outcome, self._progress)]


class SampledMemory(TrainingObserver):
    """Reads the memory use after each step."""

    def __init__(self, outcome: RunOutcome) -> None:
        self._outcome = outcome

    def on_step(self, report: StepReport) -> None:
        """Read it."""
        self._outcome.memory.sample()

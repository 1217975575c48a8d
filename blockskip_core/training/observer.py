"""Observers of a running training, which can look at each step and work between two steps."""

from __future__ import annotations

from collections.abc import Callable

from .result import StepReport


class TrainingObserver:
    """Follows a training. Every method does nothing; override those that matter. Each may raise to interrupt the run."""

    def started(self, step: int) -> None:
        """Note that the training begins, or resumes after ``step`` steps; it may do so more than once."""

    def on_step(self, report: StepReport) -> None:
        """Look at the optimiser step that was just made; the model is still loaded."""

    def is_due(self, step: int) -> bool:
        """Return whether to call :meth:`between_steps` after ``step`` steps; 0 is before the first.

        It is asked when these steps are made, and again if it says yes, so the answer must stay until then.
        """
        return False

    def between_steps(self, step: int) -> None:
        """Work while the trained model is unloaded, e.g. sample a picture.

        It must restore the state of random generators and free its memory.
        """


class OnStep(TrainingObserver):
    """Calls a function after every step."""

    def __init__(self, call: Callable[[StepReport], None]) -> None:
        self._call = call

    def on_step(self, report: StepReport) -> None:
        """Call the function."""
        self._call(report)

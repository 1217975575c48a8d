"""What others may do while a training runs: look at each step, and work between two steps."""

from __future__ import annotations

from collections.abc import Callable

from .result import StepReport


class TrainingObserver:
    """Follows a training. Every method does nothing; override those that matter. Each may raise to interrupt the run."""

    def on_step(self, report: StepReport) -> None:
        """Look at an optimiser step that was just done; the model is still loaded."""

    def is_due(self, step: int) -> bool:
        """Whether :meth:`between_steps` is wanted after this many steps; 0 is before the first."""
        return False

    def between_steps(self, step: int) -> None:
        """Work while the model that is trained on is unloaded, e.g. sample a picture.

        What it takes of random numbers and memory it gives back.
        """


class OnStep(TrainingObserver):
    """Calls a function after every step."""

    def __init__(self, call: Callable[[StepReport], None]) -> None:
        self._call = call

    def on_step(self, report: StepReport) -> None:
        """Call it."""
        self._call(report)

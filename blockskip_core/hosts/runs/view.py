"""Who follows a run: a node, or a command line. The run knows only what is declared here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ...training.observer import TrainingObserver

if TYPE_CHECKING:  # the run imports this module
    from .outcome import RunOutcome
    from .prepare import PreparedRun


class RunProgress(Protocol):
    """Shows what a run is doing."""

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``phase`` are finished; may raise to interrupt."""
        ...

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        ...


class RunView:
    """Follows a run in more detail. Every method does nothing; override those that matter."""

    def observers(self, run: PreparedRun, outcome: RunOutcome, training_peak: int) -> Sequence[TrainingObserver]:
        """Return what looks at each step, before the run writes its files for that step.

        Args:
            run: The prepared run.
            outcome: Filled in during the run.
            training_peak: Counted bytes that the training needs on the device.
        """
        return ()

    def saved(self) -> None:
        """Note that the run has saved what it learned, or failed to."""

    def ended(self) -> None:
        """Note that the training is over, however it ended, before anything is saved."""

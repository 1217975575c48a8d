"""A run on the command line: progress in the log, and a polite end when the system asks for one."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class Stopped(KeyboardInterrupt):
    """The user or the system has asked the run to stop. What was learned is saved on the way out."""


class Console:
    """Logs what a run is doing, and ends it between two steps after Ctrl+C or a request to terminate.

    Spot machines, job queues and launchers send SIGTERM and wait; the step under way is finished and saved first. A
    second Ctrl+C ends the run at once.

    Args:
        rank: Number of this process; only process 0 logs its progress.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._phase = ""
        self._last = 0.0
        self.signal = 0

    def listen(self) -> None:
        """Listen for signals that ask to stop, in a program's main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Log a phase when it begins, ends, and now and then.

        Raises:
            Stopped: If the run was asked to stop.
        """
        now = time.monotonic()
        if not self._rank and (phase != self._phase or done >= total or now - self._last >= SECONDS_BETWEEN_LINES):
            self._phase, self._last = phase, now
            logger.info("%s: %d of %d%s", phase, done, total, f" · {detail}" if detail else "")
        if self.signal:
            raise Stopped

    def say(self, text: str) -> None:
        """Log a sentence."""
        if not self._rank:
            logger.info("%s", text)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise Stopped
        self.signal = number
        logger.warning("Asked to stop: the step under way is finished and saved first. Ask again to stop at once.")

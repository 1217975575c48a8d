"""What the user sees while a word is learned: the progress bar, a line of text, and the chart."""

from __future__ import annotations

from datetime import timedelta

import torch

from ...blockskip_core.hosts.runs.peak_memory import PeakMemory
from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.training.result import StepReport
from ...blockskip_core.units import format_bytes
from ...blockskip_core.zoodip.settings import WordSettings
from ...blockskip_core.zoodip.training import WordResult
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress

STEPS_OF_PACE = 20
"""Number of latest steps over which the time per step is averaged."""


class WordDisplay(TrainingObserver):
    """Shows each step. It is the last observer, because Cancel ends a run here.

    Attributes:
        memory: Of the run, sampled in every step.
    """

    def __init__(
        self, settings: WordSettings, result: WordResult, progress: NodeProgress, chart: LiveChart, device: torch.device
    ) -> None:
        self._settings, self._result, self._progress, self._chart = settings, result, progress, chart
        self.memory = PeakMemory(device)

    @property
    def peak(self) -> str:
        """The most memory in use so far, in words."""
        return f"{format_bytes(self.memory.peak)} ({self.memory.what})"

    def earlier(self) -> None:
        """Show the steps of an interrupted run on the chart."""
        if self._result.losses:
            self._chart.earlier(self._result.losses, self._settings.steps)

    def on_step(self, report: StepReport) -> None:
        """Show a step."""
        self.memory.sample()
        latest = self._result.step_seconds[-STEPS_OF_PACE:]
        pace, steps = sum(latest) / len(latest), self._settings.steps
        left = timedelta(seconds=round(pace * (steps - report.step)))
        self._chart.step(
            report.step, steps, report.loss, report.learning_rate, seconds_per_step=pace,
            seconds_left=left.total_seconds(), memory_now=self.memory.now, memory_peak=self.memory.peak,
            memory_of=self.memory.what,
        )  # fmt: skip
        detail = f"loss {report.loss:.4f} · {pace:.2f} s/step · {left} left · peak {format_bytes(self.memory.peak)}"
        self._progress("training step", report.step, steps, detail)

"""What the user sees while patch adapters are trained: the chart's curve, and the error by noise level as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blockskip_core.ddit.error_table import ErrorTable
from ..blockskip_core.distillation.loop import DistillationResult
from ..blockskip_core.distillation.settings import DistillationSettings
from ..blockskip_core.hosts.runs.peak_memory import PeakMemory
from ..blockskip_core.reporting.patch_pictures import error_chart
from .page.live_chart import LiveChart
from .page.progress import NodeProgress


class DistillationDisplay:
    """Shows each step on the chart, and each measurement beside the error without training.

    Args:
        scales: The patch sizes, in the order of their training; their steps follow each other on the chart.
        settings: Of each training.
        progress: The node's.
        chart: The node's.
        device: The model's.
    """

    def __init__(
        self, scales: Sequence[int], settings: DistillationSettings, progress: NodeProgress, chart: LiveChart,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._scales, self._settings, self._progress, self._chart = list(scales), settings, progress, chart
        self._steps = settings.steps * len(scales)
        self._losses: dict[int, int] = dict.fromkeys(scales, 0)  # scale -> losses on the chart
        self._measured: dict[int, int] = dict.fromkeys(scales, 0)
        self._memory = PeakMemory(device)

    def seen(self, scale: int, result: DistillationResult) -> None:
        """Show what is new of one patch size's training."""
        self._memory.sample()
        before = sum(self._losses[each] for each in self._scales[: self._scales.index(scale)])
        known = self._losses[scale]
        for number, loss in enumerate(result.losses[known:], known + 1):
            made = result.steps - result.resumed_at
            pace = result.seconds / made if made else 0.0
            self._chart.step(
                before + number, self._steps, loss, self._settings.rate_after(number - 1), seconds_per_step=pace,
                seconds_left=pace * (self._steps - before - number), memory_now=self._memory.now,
                memory_peak=self._memory.peak, memory_of=self._memory.what,
            )  # fmt: skip
        self._losses[scale] = len(result.losses)
        if len(result.measured) > self._measured[scale]:
            self._measured[scale] = len(result.measured)
            step, errors = result.measured[-1]
            tables = {
                f"{scale}x, step {step}": ErrorTable(result.levels, errors),
                f"{scale}x, without training": ErrorTable(result.levels, result.untrained),
            }
            self._progress.show(error_chart(tables))

"""The trainer's work from request to outputs: prepare, carry out with a chart on the node, return as core's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...blockskip_core.adapters.lora_formats import to_host_lora
from ...blockskip_core.hosts.files.lora_files import LoraModel
from ...blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ...blockskip_core.hosts.runs.figures import metadata, on_node
from ...blockskip_core.hosts.runs.outcome import RunOutcome
from ...blockskip_core.hosts.runs.prepare import PreparedRun, prepare
from ...blockskip_core.hosts.runs.progress_line import ProgressLine
from ...blockskip_core.hosts.runs.request import RunRequest
from ...blockskip_core.hosts.runs.training import carry_out
from ...blockskip_core.hosts.runs.view import RunView
from ...blockskip_core.residuals.residual_set import ResidualSet
from ...blockskip_core.training.observer import TrainingObserver
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress
from .display import RunChart
from .samples import RunSamples


@dataclass(frozen=True)
class TrainedLora:
    """The outputs of the trainer's node, and figures for the page."""

    lora: LoraModel
    loss_map: dict[str, list[float]]
    steps: int
    ui: dict[str, Any]


def run_training(
    model: Any, residuals: ResidualSet, request: RunRequest, progress: NodeProgress, chart: LiveChart
) -> TrainedLora:
    """Train a LoRA as requested, save it, and return it as core's trainer would.

    Raises:
        BlockSkipError: If the run cannot start or continue; the message names the file with the LoRA so far. Any other
            exception, including Cancel, is passed on after the LoRA so far has been saved.
    """
    with out_of_memory_explained("Preparing the training", "Unload whatever else uses the device, and queue again."):
        run = prepare(model, residuals, request)
    outcome = carry_out(run, progress, NodeView(progress, chart))
    with torch.inference_mode(False):  # ordinary tensors, like those of core's trainer
        tensors = to_host_lora(run.adapters.state_dict(), run.adapters.scale)
    return TrainedLora(
        LoraModel(tensors, metadata(run, outcome)),
        {"loss": outcome.result.losses},
        outcome.result.steps,
        {"blockskip": [on_node(run, outcome)]},
    )


class NodeView(RunView):
    """Shows a run on the trainer's node: chart, progress, pictures."""

    def __init__(self, progress: NodeProgress, chart: LiveChart) -> None:
        self._progress, self._live = progress, chart
        self._chart: RunChart | None = None

    def observers(self, run: PreparedRun, outcome: RunOutcome, training_peak: int) -> Sequence[TrainingObserver]:
        """Return the chart, the line of text and, if requested, the pictures."""
        self._chart = RunChart(run, outcome, self._live)
        shown: list[TrainingObserver] = [self._chart, ProgressLine(run, outcome, self._progress)]
        if run.sampler is not None:
            pictures = partial(run.sampler.pictures, run.adapters, training_peak=training_peak)
            shown.append(
                RunSamples(
                    outcome,
                    self._progress,
                    self._live,
                    run.sampler.request,
                    pictures,
                    steps=run.request.steps,
                    key=run.identity.key,
                )  # fmt: skip
            )
        return shown

    def saved(self) -> None:
        """Show what the run has saved."""
        if self._chart is not None:
            self._chart.saved()

    def ended(self) -> None:
        """Show the last state of the chart."""
        if self._chart is not None:
            self._chart.run_ended()

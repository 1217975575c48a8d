"""A word's training in TensorBoard: losses, step size, gradient and memory of every step."""

from __future__ import annotations

from pathlib import Path, PurePath

from ...blockskip_core.hosts.files.lora_files import events_folder_named
from ...blockskip_core.hosts.runs.events import memory_figures
from ...blockskip_core.hosts.runs.peak_memory import PeakMemory
from ...blockskip_core.reporting.step_events import StepEvents
from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.training.result import StepReport
from ...blockskip_core.zoodip.training import WordResult


class WordEvents(TrainingObserver):
    """Writes each step, into output/tensorboard/NAME-KEY.

    Args:
        name: The word's name, perhaps with folders.
        key: The run's content hash.
        steps: Number of steps of the whole run.
        result: Of the run, with the losses of an interrupted one.
        memory: Of the run.

    Raises:
        InvalidInputError: If the package tensorboard is missing, or a folder is a link out of the output folder.
    """

    def __init__(self, name: PurePath, key: str, steps: int, result: WordResult, memory: PeakMemory) -> None:
        self._memory = memory
        self._events = StepEvents(events_folder_named(Path(name), key), steps, result.problems.append)
        self._events.begin(result.losses)

    def on_step(self, report: StepReport) -> None:
        """Write a step."""
        self._memory.sample()
        figures = {"training/step_size": report.learning_rate, "training/gradient_norm": report.grad_norm}
        self._events.add(report.step, report.loss, {**figures, **memory_figures(self._memory)})

    def close(self) -> None:
        """Write everything to the disk."""
        self._events.close()

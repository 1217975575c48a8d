"""The training of patch adapters in TensorBoard: one folder for each patch size, which its name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..blockskip_core.distillation.loop import DistillationResult
from ..blockskip_core.distillation.settings import DistillationSettings
from ..blockskip_core.hosts.files.lora_files import events_folder
from ..blockskip_core.hosts.runs.events import memory_figures
from ..blockskip_core.hosts.runs.peak_memory import PeakMemory
from ..blockskip_core.reporting.event_files import require_tensorboard
from ..blockskip_core.reporting.step_events import StepEvents


class DistillationEvents:
    """Writes loss, learning rate, held-out error and memory; a context manager that closes the files.

    Args:
        file: The adapters' file, whose name the folders take; None writes nothing.
        settings: Of each training.
        device: The model's.
        told: Called with a sentence if the disk fails.

    Raises:
        InvalidInputError: If the package tensorboard is missing; later, if a folder is a link out of the output folder.
    """

    def __init__(
        self, file: Path | None, settings: DistillationSettings, device: torch.device, told: Callable[[str], object]
    ) -> None:
        if file is not None:
            require_tensorboard()
        self._file, self._settings, self._told = file, settings, told
        self._memory = PeakMemory(device)
        self._events: StepEvents | None = None
        self._is_open, self._known, self._measured = False, 0, 0

    def __enter__(self) -> DistillationEvents:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._events is not None:
            self._events.close()

    def begun(self, scale: int, key: str) -> None:
        """Turn to the next patch size."""
        if self._file is None:
            return
        self.__exit__()
        self._events = StepEvents(events_folder(self._file, key, f"{scale}x"), self._settings.steps, self._told)
        self._is_open = False

    def seen(self, scale: int, result: DistillationResult) -> None:
        """Write what is new of this patch size's training."""
        if self._events is None:
            return
        if not self._is_open:
            self._open(self._events, result)
        self._memory.sample()
        for step in range(self._known + 1, result.steps + 1):
            figures = {"training/learning_rate": self._settings.rate_after(step - 1), **memory_figures(self._memory)}
            self._events.add(step, result.losses[step - 1], figures)
        self._known = result.steps
        for step, errors in result.measured[self._measured :]:
            self._events.add_figures(step, {"error/held_out": sum(errors) / len(errors)})
        self._measured = len(result.measured)

    def _open(self, events: StepEvents, result: DistillationResult) -> None:
        """Continue the files of an interrupted training, or begin them with what its state has."""
        self._is_open, self._known = True, result.resumed_at
        continues = events.begin(result.losses[: self._known]) and self._known > 0
        self._measured = sum(step <= self._known for step, _ in result.measured) if continues else 0

"""The figures of a training in TensorBoard, step by step, whatever is trained; see ``event_files``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .event_files import EventFiles, require_tensorboard
from .loss_curve import ExponentialMean, smoothing_span

logger = logging.getLogger(__name__)


class StepEvents:
    """Writes a training's event files. If the disk fails, that is told once and the training continues without them.

    Args:
        folder: The training's own folder; one that resumes finds its earlier files there.
        steps: Number of steps of the whole training, which decides how far the loss is smoothed.
        told: Called with a sentence if the disk fails.

    Raises:
        InvalidInputError: If the package tensorboard is missing.
    """

    def __init__(self, folder: Path, steps: int, told: Callable[[str], object]) -> None:
        require_tensorboard()
        self._folder, self._steps, self._told = folder, steps, told
        self._file: EventFiles | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a file to write to."""
        return self._file is not None

    def begin(self, losses: Sequence[float] = ()) -> bool:
        """Continue the files after these steps, or begin them with the steps' losses; return whether they continue."""
        self.close()
        self._guarded(lambda: self._open(losses))
        return self._file is not None and self._file.continues

    def add(self, step: int, loss: float, figures: Mapping[str, float | None]) -> None:
        """Write a step: its loss, the smoothed loss, and further figures by their names."""
        self.add_figures(step, {**self._losses(loss), **figures})

    def add_figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write figures by their names, except those that are not known."""
        if self._file is not None:
            file = self._file
            self._guarded(lambda: file.add(step, figures))

    def add_picture(self, step: int, name: str, path: Path) -> None:
        """Write a picture."""
        if self._file is not None:
            file = self._file
            self._guarded(lambda: file.add_picture(step, name, path))

    def close(self) -> None:
        """Write everything to the disk."""
        if self._file is not None:
            self._guarded(self._file.close)
        self._file = None

    def _open(self, losses: Sequence[float]) -> None:
        self._smoothed = ExponentialMean(smoothing_span(self._steps))
        self._file = file = EventFiles(self._folder, len(losses) + 1 if losses else 0)
        for step, loss in enumerate(losses, 1):
            figures = self._losses(loss)
            if not file.continues:
                file.add(step, figures)

    def _losses(self, loss: float) -> dict[str, float | None]:
        return {"training/loss": loss, "training/loss_smoothed": self._smoothed.add(loss)}

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            logger.exception("BlockSkip: the files for TensorBoard cannot be written")
            self._file = None
            self._told(
                f"The files for TensorBoard cannot be written ({error}). This run writes no more of them; the training "
                "continues."
            )

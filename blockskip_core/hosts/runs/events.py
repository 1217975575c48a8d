"""A run in TensorBoard: losses, learning rate, memory, likeness and samples, step by step.

All LoRAs that one run saves under one name share a folder, so a run that resumes continues its own curves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...reporting.event_files import EventFiles, require_tensorboard
from ...reporting.loss_curve import ExponentialMean, smoothing_span
from ...training.observer import TrainingObserver
from ...training.result import StepReport
from ..files.lora_files import events_folder
from .outcome import RunOutcome, Sample
from .prepare import PreparedRun

logger = logging.getLogger(__name__)


class RunEvents(TrainingObserver):
    """Writes a run's event files. If the disk fails, the problem is reported and the run continues without them.

    Args:
        run: The run.
        outcome: Its memory must be sampled before each step is shown to this; its samples are written with the next step.

    Raises:
        InvalidInputError: If the package tensorboard is missing, or the folder is a link out of the output folder.
    """

    def __init__(self, run: PreparedRun, outcome: RunOutcome) -> None:
        require_tensorboard()
        self._folder = events_folder(outcome.path, run.identity.key)
        self._config, self._outcome = run.request.config, outcome
        self._file: EventFiles | None = None
        self._num_samples = 0

    def started(self, step: int) -> None:
        """Continue the files after ``step`` steps, or begin them with the losses of these steps."""
        self.close()
        self._guarded(lambda: self._open(step))

    def on_step(self, report: StepReport) -> None:
        """Write a step, after the samples that were made before it."""
        self._guarded(lambda: self._add(report))

    def close(self) -> None:
        """Write everything to the disk."""
        self._guarded(self._close)
        self._file = None

    def _open(self, step: int) -> None:
        config, losses = self._config, self._outcome.result.losses
        self._smoothed = ExponentialMean(smoothing_span(config.steps))
        self._file = file = EventFiles(self._folder, step + 1 if step else 0)
        for earlier in range(step):
            part = losses[earlier * config.accumulation : (earlier + 1) * config.accumulation]
            figures = self._losses(sum(part) / len(part))
            if not file.continues:
                file.add(earlier + 1, figures)
        if file.continues:
            self._num_samples = len(self._outcome.samples)

    def _add(self, report: StepReport) -> None:
        if self._file is None:
            return
        self._add_samples(self._file)
        memory = self._outcome.memory
        self._file.add(
            report.step,
            {
                **self._losses(report.loss),
                "training/learning_rate": report.learning_rate,
                "training/gradient_norm": report.grad_norm,
                "memory/GiB_now": memory.now / 2**30,
                "memory/GiB_peak": memory.peak / 2**30,
            },
        )

    def _losses(self, loss: float) -> dict[str, float | None]:
        return {"training/loss": loss, "training/loss_smoothed": self._smoothed.add(loss)}

    def _add_samples(self, file: EventFiles) -> None:
        samples: list[Sample] = self._outcome.samples[self._num_samples :]
        for sample in samples:
            file.add(sample.step, {f"likeness/prompt_{sample.prompt}": sample.likeness})
            file.add_picture(sample.step, f"samples/prompt_{sample.prompt}", sample.path)
        self._num_samples += len(samples)

    def _close(self) -> None:
        if self._file is not None:
            self._add_samples(self._file)
            self._file.close()

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            logger.exception("BlockSkip: the files for TensorBoard cannot be written")
            self._file = None
            self._outcome.result.problems.append(
                f"The files for TensorBoard cannot be written ({error}). This run writes no more of them; the training "
                "continues."
            )

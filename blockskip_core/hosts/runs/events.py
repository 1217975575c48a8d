"""A run in TensorBoard: losses, learning rate, memory, likeness and samples, step by step.

All LoRAs that one run saves under one name share a folder, so a run that resumes continues its own curves.
"""

from __future__ import annotations

from ...reporting.step_events import StepEvents
from ...training.observer import TrainingObserver
from ...training.result import StepReport
from ..files.lora_files import events_folder
from .outcome import RunOutcome, Sample
from .peak_memory import PeakMemory
from .prepare import PreparedRun


def memory_figures(memory: PeakMemory) -> dict[str, float | None]:
    """Return memory's figures by their names in event files."""
    return {"memory/GiB_now": memory.now / 2**30, "memory/GiB_peak": memory.peak / 2**30}


class RunEvents(TrainingObserver):
    """Writes a run's event files. If the disk fails, the problem is reported and the run continues without them.

    Args:
        run: The run.
        outcome: Its memory must be sampled before each step is shown to this; its samples are written with the next step.

    Raises:
        InvalidInputError: If the package tensorboard is missing, or the folder is a link out of the output folder.
    """

    def __init__(self, run: PreparedRun, outcome: RunOutcome) -> None:
        self._config, self._outcome = run.request.config, outcome
        folder = events_folder(outcome.path, run.identity.key)
        self._events = StepEvents(folder, self._config.steps, outcome.result.problems.append)
        self._num_samples = 0

    def started(self, step: int) -> None:
        """Continue the files after ``step`` steps, or begin them with the losses of these steps."""
        if self._events.is_open:  # the run begins anew, with samples that were made since its last step
            self._add_samples()
        size, losses = self._config.accumulation, self._outcome.result.losses
        parts = [losses[earlier * size : (earlier + 1) * size] for earlier in range(step)]
        if self._events.begin([sum(part) / len(part) for part in parts]):
            self._num_samples = len(self._outcome.samples)

    def on_step(self, report: StepReport) -> None:
        """Write a step, after the samples that were made before it."""
        self._add_samples()
        figures = {
            "training/learning_rate": report.learning_rate,
            "training/gradient_norm": report.grad_norm,
            **memory_figures(self._outcome.memory),
        }
        self._events.add(report.step, report.loss, figures)

    def close(self) -> None:
        """Write everything to the disk."""
        self._add_samples()
        self._events.close()

    def _add_samples(self) -> None:
        samples: list[Sample] = self._outcome.samples[self._num_samples :]
        for sample in samples:
            self._events.add_figures(sample.step, {f"likeness/prompt_{sample.prompt}": sample.likeness})
            self._events.add_picture(sample.step, f"samples/prompt_{sample.prompt}", sample.path)
        self._num_samples += len(samples)

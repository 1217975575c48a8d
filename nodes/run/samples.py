"""Pictures during a training run: sampled between steps when due or asked for, saved beside the LoRA, shown on the node."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import folder_paths
from comfy.model_management import InterruptProcessingException
from PIL import Image
from torch import Tensor

from ...blockskip_core.errors import StorageError
from ...blockskip_core.files import write_atomically
from ...blockskip_core.hosts.files.folders import run_folder
from ...blockskip_core.hosts.files.kept_samples import KeptSample, read_kept_samples, sample_path, write_kept_samples
from ...blockskip_core.hosts.runs.outcome import Sample
from ...blockskip_core.hosts.runs.peak_memory import PeakMemory
from ...blockskip_core.hosts.sampling.training_samples import SampleRequest
from ...blockskip_core.reporting.pictures import as_picture
from ...blockskip_core.reporting.run_report import sample_of
from ...blockskip_core.training.checkpoints import SAMPLES_FILE
from ...blockskip_core.training.observer import TrainingObserver
from ...blockskip_core.training.result import TrainingResult
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress

logger = logging.getLogger(__name__)


class SampledOutcome(Protocol):
    """The result of a run, as far as its samples need it; see ``hosts.runs.outcome``."""

    memory: PeakMemory
    samples: list[Sample]

    @property
    def path(self) -> Path:
        """Beside which pictures are saved."""
        ...

    @property
    def result(self) -> TrainingResult:
        """Of the training loop."""
        ...


class Pictures(Protocol):
    """Makes the pictures."""

    def __call__(self, *, on_step: Callable[[int, int], None]) -> list[Tensor]:
        """Return one picture per prompt; ``on_step`` gets (done, total)."""
        ...


class RunSamples(TrainingObserver):
    """Samples between steps when due.

    Args:
        outcome: Receives the pictures, and a sentence if sampling fails; then the training continues without sampling.
            They are saved beside its path.
        progress: The node's progress.
        chart: Shows the pictures.
        request: What is sampled, and when.
        pictures: Makes one picture per prompt.
        steps: Of the whole run.
        key: The run's content hash.
    """

    def __init__(
        self, outcome: SampledOutcome, progress: NodeProgress, chart: LiveChart, request: SampleRequest,
        pictures: Pictures, *, steps: int, key: str,
    ) -> None:  # fmt: skip
        self._outcome, self._progress, self._chart = outcome, progress, chart
        self._request, self._pictures, self._steps = request, pictures, steps
        self._failed = self._likeness_failed = False
        self._names = run_folder(key) / SAMPLES_FILE

    def started(self, step: int) -> None:
        """Show the samples that the interrupted run made up to ``step``."""
        self._chart.offer_samples(step < self._steps)
        if step and not self._outcome.samples:
            for sample in read_kept_samples(self._names, self._request.identity, step):
                self._show_again(sample)

    def is_due(self, step: int) -> bool:
        """Return whether pictures are due after ``step`` steps and not there yet, or a user has asked for them."""
        made = sum(sample.step == step for sample in self._outcome.samples)
        due = self._request.is_due(step, self._steps) and made < len(self._request.positive)
        return (due or self._chart.wants_sample) and not self._failed

    def between_steps(self, step: int) -> None:
        """Sample, save and show. Cancel ends the run as usual; any other failure ends only the sampling."""
        try:
            with self._outcome.memory.apart():
                pictures = self._pictures(
                    on_step=lambda done, total: self._progress(f"sampling after step {step}", done, total)
                )
            for prompt, (picture, likeness) in enumerate(zip(pictures, self._likeness(pictures, step), strict=True), 1):
                self._keep(as_picture(picture), step, prompt, likeness)
            self._keep_names()
            self._chart.offer_samples(step < self._steps)
        except InterruptProcessingException:
            raise
        except Exception as error:
            logger.exception("BlockSkip: sampling failed")
            self._failed = True
            self._chart.offer_samples(False)
            self._outcome.result.problems.append(
                f"Sampling after step {step} failed ({type(error).__name__}: {error}). This run samples no more "
                "pictures; the training continues."
            )

    def _likeness(self, pictures: Sequence[Tensor], step: int) -> Sequence[float | None]:
        """Return how alike every picture is to the training pictures; if that fails, nothing else does."""
        likeness = self._request.likeness
        if likeness is not None and not self._likeness_failed:
            try:
                with self._outcome.memory.apart():
                    return likeness.of(pictures)
            except InterruptProcessingException:
                raise
            except Exception as error:
                logger.exception("BlockSkip: the likeness could not be computed")
                self._likeness_failed = True
                self._outcome.result.problems.append(
                    f"The likeness after step {step} could not be computed ({type(error).__name__}: {error}). This run "
                    "compares no more samples; sampling and training continue."
                )
        return [None] * len(pictures)

    def _keep(self, picture: Image.Image, step: int, prompt: int, likeness: float | None) -> None:
        path = sample_path(self._outcome.path, step, prompt)
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
        self._show(picture, KeptSample(step, prompt, path, likeness))

    def _keep_names(self) -> None:
        """Write where the samples are, for the run that may have to resume this one."""
        kept = [KeptSample(made.step, made.prompt, made.path, made.likeness) for made in self._outcome.samples]
        try:
            write_kept_samples(self._names, self._request.identity, kept)
        except StorageError as error:
            logger.exception("BlockSkip: the names of the samples cannot be kept")
            self._outcome.result.problems.append(f"{error} A run that resumes this one will not show its samples.")

    def _show_again(self, sample: KeptSample) -> None:
        try:
            with Image.open(sample.path) as file:
                self._show(file.convert("RGB"), sample)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what damaged files raise
            logger.warning("BlockSkip: the sample %s cannot be shown again (%s)", sample.path.name, error)

    def _show(self, picture: Image.Image, sample: KeptSample) -> None:
        """Put a picture into the summary and the chart."""
        step, prompt, path, likeness = sample
        label = f"step {step:,}" + (f", prompt {prompt}" if len(self._request.positive) > 1 else "")
        label += "" if likeness is None else f", likeness {likeness:.4f}"
        self._outcome.samples.append(Sample(step, prompt, path, sample_of(picture, label), likeness))
        subfolder = _below_output(path)
        if subfolder is not None:
            self._chart.sample(step, prompt, path.name, subfolder, likeness)


def _below_output(path: Path) -> str | None:
    """Return the file's folder below the output folder, or None for a place that the host serves no pictures from."""
    folder = os.path.relpath(path.parent, folder_paths.get_output_directory())
    if folder.split(os.sep)[0] == os.pardir:  # outside, through a link
        return None
    return "" if folder == os.curdir else Path(folder).as_posix()

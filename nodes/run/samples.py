"""Pictures during a training run: sampled between steps when due or asked for, saved beside the LoRA, shown on the node."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy.model_management import InterruptProcessingException
from PIL import Image
from torch import Tensor

from ...blockskip_core.errors import StorageError
from ...blockskip_core.files import write_atomically
from ...blockskip_core.hosts.files.folders import run_folder
from ...blockskip_core.hosts.files.kept_samples import KeptSample, read_kept_samples, sample_path, write_kept_samples
from ...blockskip_core.hosts.runs.outcome import RunOutcome, Sample
from ...blockskip_core.hosts.runs.prepare import PreparedRun
from ...blockskip_core.hosts.sampling.training_samples import TrainingSampler
from ...blockskip_core.reporting.pictures import as_picture
from ...blockskip_core.reporting.run_report import sample_of
from ...blockskip_core.training.checkpoints import SAMPLES_FILE
from ...blockskip_core.training.observer import TrainingObserver
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress

logger = logging.getLogger(__name__)


class RunSamples(TrainingObserver):
    """Samples between steps when due.

    Args:
        run: The run; pictures are saved beside its LoRA.
        outcome: Receives the pictures, and a sentence if sampling fails; then the training continues without sampling.
        progress: The node's progress.
        chart: Shows the pictures.
        sampler: Makes the pictures.
        training_peak: Counted bytes that the training needs on the device.
    """

    def __init__(
        self,
        run: PreparedRun,
        outcome: RunOutcome,
        progress: NodeProgress,
        chart: LiveChart,
        sampler: TrainingSampler,
        *,
        training_peak: int,
    ) -> None:
        self._run, self._outcome, self._progress, self._chart = run, outcome, progress, chart
        self._sampler, self._training_peak = sampler, training_peak
        self._failed = self._likeness_failed = False
        self._names = run_folder(run.identity.key) / SAMPLES_FILE

    def started(self, step: int) -> None:
        """Show the samples that the interrupted run made up to ``step``."""
        self._chart.offer_samples(step < self._run.request.steps)
        if step and not self._outcome.samples:
            for sample in read_kept_samples(self._names, self._sampler.request.identity, step):
                self._show_again(sample)

    def is_due(self, step: int) -> bool:
        """Return whether pictures are due after ``step`` steps and not there yet, or a user has asked for them."""
        request = self._sampler.request
        made = sum(sample.step == step for sample in self._outcome.samples)
        due = request.is_due(step, self._run.request.steps) and made < len(request.positive)
        return (due or self._chart.wants_sample) and not self._failed

    def between_steps(self, step: int) -> None:
        """Sample, save and show. Cancel ends the run as usual; any other failure ends only the sampling."""
        try:
            with self._outcome.memory.apart():
                pictures = self._sampler.pictures(
                    self._run.adapters,
                    training_peak=self._training_peak,
                    on_step=lambda done, total: self._progress(f"sampling after step {step}", done, total),
                )
            for prompt, (picture, likeness) in enumerate(zip(pictures, self._likeness(pictures, step), strict=True), 1):
                self._keep(as_picture(picture), step, prompt, likeness)
            self._keep_names()
            self._chart.offer_samples(step < self._run.request.steps)
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
        likeness = self._sampler.request.likeness
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
            write_kept_samples(self._names, self._sampler.request.identity, kept)
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
        label = f"step {step:,}" + (f", prompt {prompt}" if len(self._sampler.request.positive) > 1 else "")
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

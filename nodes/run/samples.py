"""The pictures of a training run: sampled between steps, saved beside the LoRA, shown on the node."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_management import InterruptProcessingException
from PIL import Image

from ...blockskip_core.adapters.lora import LoraAdapters
from ...blockskip_core.errors import InvalidInputError
from ...blockskip_core.files import write_atomically
from ...blockskip_core.hosts.sampling.training_samples import SampleRequest, TrainingSampler
from ...blockskip_core.reporting.pictures import as_picture
from ...blockskip_core.reporting.run_report import ReportSample, sample_of
from ...blockskip_core.selection.selection import BlockSelection
from ..page.progress import NodeProgress
from .peak_memory import PeakMemory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A picture of the run.

    Attributes:
        step: Training steps before it.
        prompt: Its place among the prompts, from 1.
        path: Where it is.
        small: What is in the file, as the run's summary shows it.
    """

    step: int
    prompt: int
    path: Path
    small: ReportSample


class RunSamples:
    """Samples when it is due; an ``Interlude`` of the training loop.

    Attributes:
        training_peak: Bytes on the device that the training takes, by count; set before the run.
        samples: What there is so far.

    Args:
        model: The MODEL.
        request: From Sample While Training.
        selection: Blocks that are not trained.
        adapters: The LoRA.
        lora_path: Where the run's LoRA will be; pictures stand beside it.
        last_step: Steps of the run.
        memory: Watches the peak.
        progress: The node's.
        problems: Gets a sentence if sampling fails; the training goes on without it.
    """

    def __init__(
        self,
        model: Any,
        request: SampleRequest,
        selection: BlockSelection,
        adapters: LoraAdapters,
        *,
        lora_path: Path,
        last_step: int,
        memory: PeakMemory,
        progress: NodeProgress,
        problems: list[str],
    ) -> None:
        if not isinstance(request, SampleRequest):
            raise InvalidInputError(f"samples must come from Sample While Training, got a {type(request).__name__}.")
        self._sampler = TrainingSampler(model, request, selection)
        self._adapters, self._lora_path, self._last_step = adapters, lora_path, last_step
        self._memory, self._progress, self._problems = memory, progress, problems
        self._failed = False
        self.training_peak = 0
        self.samples: list[Sample] = []

    def is_due(self, step: int) -> bool:
        """Whether pictures are wanted after so many steps."""
        return not self._failed and self._sampler.request.is_due(step, self._last_step)

    def __call__(self, step: int) -> None:
        """Sample, save and show. Cancel ends the run as anywhere; anything else that fails ends the sampling only."""
        try:
            with self._memory.apart():
                pictures = self._sampler.pictures(
                    self._adapters,
                    training_peak=self.training_peak,
                    on_step=lambda done, total: self._progress(f"sampling after step {step}", done, total),
                )
            for prompt, picture in enumerate(pictures, 1):
                self._keep(as_picture(picture), step, prompt)
        except InterruptProcessingException:
            raise
        except Exception as error:
            logger.exception("BlockSkip: sampling failed")
            self._failed = True
            self._problems.append(
                f"Sampling after step {step} failed ({type(error).__name__}: {error}). No more pictures are sampled in "
                "this run; the training goes on."
            )

    def _keep(self, picture: Image.Image, step: int, prompt: int) -> None:
        path = self._lora_path.with_name(f"{self._lora_path.stem}step{step:06}_{prompt}.png")
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
        label = f"step {step:,}" + (f", prompt {prompt}" if len(self._sampler.request.positive) > 1 else "")
        self.samples.append(Sample(step, prompt, path, sample_of(picture, label)))
        self._progress.show(picture)

    def for_report(self) -> list[ReportSample]:
        """Return the pictures for the run's summary."""
        return [sample.small for sample in self.samples]

    def output(self) -> dict[str, Any]:
        """Return the pictures as an entry of the node's ``ui``, which shows them."""
        if not self.samples:
            return {}
        folder = os.path.relpath(self._lora_path.parent, folder_paths.get_output_directory())
        if folder.split(os.sep)[0] == os.pardir:  # behind a link, where the host shows no pictures
            return {}
        subfolder = "" if folder == os.curdir else Path(folder).as_posix()
        return {
            "images": [
                {"filename": sample.path.name, "subfolder": subfolder, "type": "output"} for sample in self.samples
            ]
        }

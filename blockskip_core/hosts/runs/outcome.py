"""The result of a run so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...reporting.likeness_table import ScoredSample
from ...reporting.run_report import ReportSample
from ...training.result import TrainingResult
from ..files.lora_files import ReservedName
from .peak_memory import PeakMemory


@dataclass(frozen=True)
class Sample:
    """A picture sampled during the run.

    Attributes:
        step: Number of training steps before it.
        prompt: Number of its prompt, from 1.
        path: Its file.
        small: The picture in the size shown in the run's summary.
        likeness: How alike it is to the training pictures, or None if nobody asked, or it is not known.
    """

    step: int
    prompt: int
    path: Path
    small: ReportSample
    likeness: float | None = None


@dataclass
class RunOutcome:
    """The result of a run. It is filled in during the run, so it is correct whenever the run ends.

    Attributes:
        memory: Memory use of the device.
        name: Name of the LoRA's file, reserved for this run while it trains; None in a process that writes no files.
        saved: False if the LoRA could not be saved.
        summary_path: The summary beside it, if there is one.
        samples: Pictures, in order.
        result: The training loop's result.
    """

    memory: PeakMemory
    name: ReservedName | None
    saved: bool = True
    summary_path: Path | None = None
    samples: list[Sample] = field(default_factory=list)
    result: TrainingResult = field(default_factory=TrainingResult)

    @property
    def path(self) -> Path:
        """Where the LoRA is or will be saved."""
        return self.reserved.path

    @property
    def reserved(self) -> ReservedName:
        """``name``, in the process that has one."""
        assert self.name is not None, "this process writes no files"
        return self.name

    @property
    def scored_samples(self) -> list[ScoredSample]:
        """The samples with their likeness, as far as it is known."""
        return [ScoredSample(one.step, one.prompt, one.likeness, one.path.name) for one in self.samples]

    @property
    def problems(self) -> list[str]:
        """Problems that did not end the run, as sentences without duplicates."""
        return list(dict.fromkeys(self.result.problems))

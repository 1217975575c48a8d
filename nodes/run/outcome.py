"""What a run has come to so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...blockskip_core.hosts.files.lora_files import ReservedName
from ...blockskip_core.reporting.run_report import ReportSample
from ...blockskip_core.training.result import TrainingResult
from .peak_memory import PeakMemory


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


@dataclass
class RunOutcome:
    """What a run has come to. Filled in as it goes, so it is right whenever the run ends.

    Attributes:
        memory: The device's, as watched.
        name: Of the LoRA, this run's alone while it trains.
        saved: Whether it is there, or the disk has not refused it yet.
        summary_path: The summary beside it, if there is one.
        samples: Pictures, in order.
        result: What the training loop left.
    """

    memory: PeakMemory
    name: ReservedName
    saved: bool = True
    summary_path: Path | None = None
    samples: list[Sample] = field(default_factory=list)
    result: TrainingResult = field(default_factory=TrainingResult)

    @property
    def path(self) -> Path:
        """Where the LoRA is, or will be."""
        return self.name.path

    @property
    def problems(self) -> list[str]:
        """What went wrong without ending the run, in sentences, each once."""
        return list(dict.fromkeys(self.result.problems))

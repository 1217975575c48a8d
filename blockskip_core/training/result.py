"""What a training reports: step by step, and at the end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepReport:
    """A report of one optimiser step.

    Attributes:
        step: Number of the step, from 1.
        losses: Loss of each micro-batch.
        learning_rate: The learning rate used, for Prodigy times its own estimate of the step size.
        grad_norm: Gradient norm before clipping.
        seconds: Wall time of the step.
    """

    step: int
    losses: tuple[float, ...]
    learning_rate: float
    grad_norm: float
    seconds: float

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return sum(self.losses) / len(self.losses)


@dataclass
class TrainingResult:
    """The result of a run. It is filled in during the run, so it is correct whenever the run ends.

    Attributes:
        losses: Loss of every micro-batch.
        step_seconds: Seconds of every optimiser step since the run was started or resumed.
        steps: Number of optimiser steps done.
        self_check: Relative difference between the skipping and the full model before the first step, or None.
        saved_bytes: Bytes that a micro-batch kept for its backward pass, parameters not counted: the larger of the first
            two, because a budget takes effect only from the second one on.
        resumed_at: Number of steps made by an earlier run.
        overflows: Number of steps skipped because a gradient overflowed in float16.
        problems: Problems that did not end the run, as sentences.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    steps: int = 0
    self_check: float | None = None
    saved_bytes: int = 0
    resumed_at: int = 0
    overflows: int = 0
    problems: list[str] = field(default_factory=list)

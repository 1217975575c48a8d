"""The settings of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The numbers of one training; the paper gives the rank and the loss only.

    Attributes:
        steps: Optimiser steps, at most.
        batch_size: Examples per step.
        learning_rate: AdamW's, after the warm-up; it falls to 0 over ``steps`` along a cosine.
        warmup_steps: Steps over which the rate rises.
        seed: Seeds initial values, examples and noise.
        validate_every: Steps between two measurements of the held-out error.
        patience: Measurements without an improvement after which the training stops; 0 never stops it.
        max_grad_norm: Gradients are clipped to this norm.

    Raises:
        InvalidInputError: If a number is out of range.
    """

    steps: int
    batch_size: int = 4
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    seed: int = 0
    validate_every: int = 50
    patience: int = 4
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup_steps", "patience"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**64:
            raise InvalidInputError(f"seed must be between 0 and 2**64 - 1, got {self.seed}.")

    def rate_after(self, step: int) -> float:
        """Return the learning rate of the step after ``step`` steps; it depends on nothing else."""
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * rising * 0.5 * (1.0 + math.cos(math.pi * min(step, self.steps) / self.steps))

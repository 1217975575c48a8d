"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..data.flow_matching import LossWeighting
from ..data.micro_batches import MicroBatches
from ..errors import InvalidInputError
from .optimizers import PRODIGY, OptimizerName

LearningRateSchedule = Literal["constant", "constant_with_warmup", "cosine", "linear"]
_LEAST_FACTOR = 0.1  # of Prodigy's rate; below it there are rates of other optimisers, with which it would not move


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of the training loop.

    Attributes:
        steps: Number of optimiser steps.
        learning_rate: The optimiser's learning rate. A third party reports 1e-4 for the paper. Prodigy multiplies its own
            estimate by it; its authors recommend 1.
        batch_size: Number of draws that go through the model together.
        accumulation: Micro-batches per optimiser step. The paper is reported to use 4.
        seed: Seed of the LoRA's initialisation.
        lr_schedule: One of diffusers' schedules.
        warmup_steps: Used only by schedules with a warm-up.
        max_grad_norm: Gradients are clipped to this norm; 0 turns clipping off.
        weight_decay: The optimiser's weight decay.
        checkpointing: Recompute each kept block's activations in backward.
        activation_budget: Bytes that blocks may keep instead of recomputing; see ``activation_budget``. Used only with
            checkpointing.
        loss_weighting: A weighting of the SD3 paper, as diffusers computes it; "none" is the plain velocity loss.
        optimizer: See ``optimizers``.
        ema: Decay of the average that is saved in place of the last values; 0 saves these. See ``moving_average``.

    Raises:
        InvalidInputError: If a number is out of range or a name is not known.
    """

    steps: int
    learning_rate: float = 1e-4
    batch_size: int = 1
    accumulation: int = 1
    seed: int = 0
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    checkpointing: bool = True
    activation_budget: float = 0.0
    loss_weighting: LossWeighting = "none"
    optimizer: OptimizerName = "AdamW"
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**64:
            raise InvalidInputError(f"seed must be between 0 and 2**64 - 1, got {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise InvalidInputError(f"learning_rate must be positive and finite, got {self.learning_rate}.")
        for name in ("warmup_steps", "max_grad_norm", "weight_decay", "activation_budget"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0.0 <= self.ema < 1.0:
            raise InvalidInputError(f"ema must be at least 0 and below 1, got {self.ema}. 0 turns it off.")
        if self.optimizer == PRODIGY and self.learning_rate < _LEAST_FACTOR:
            raise InvalidInputError(
                f"learning_rate must be at least {_LEAST_FACTOR:g} with Prodigy, which multiplies the step size that it "
                f"finds itself by it; 1 is usual. Got {self.learning_rate:g}."
            )
        choices = {"lr_schedule": LearningRateSchedule, "loss_weighting": LossWeighting, "optimizer": OptimizerName}
        for name, names in choices.items():
            if getattr(self, name) not in get_args(names):
                raise InvalidInputError(
                    f"{name} must be one of {', '.join(get_args(names))}, got {getattr(self, name)!r}."
                )

    @property
    def without_effect(self) -> set[str]:
        """Names of settings that the values after a given number of steps do not depend on, with these settings."""
        names = {"checkpointing", "activation_budget"}
        if self.lr_schedule == "constant":
            names.add("warmup_steps")
        if self.lr_schedule not in ("linear", "cosine"):  # their rates depend on the length of the run
            names.add("steps")
        if not self.ema:
            names.add("ema")
        return names

    @property
    def micro_batches(self) -> MicroBatches:
        """How the run goes through its draws."""
        return MicroBatches(steps=self.steps, batch_size=self.batch_size, accumulation=self.accumulation)

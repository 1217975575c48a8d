"""The trainer's request: its widgets and connected inputs, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from torch import Tensor

from ...accounting.plan import MemorySettings
from ...adapters.lora import LoraSettings, LoraTargets
from ...adapters.lora_formats import LoraFileFormat
from ...data.flow_matching import LossWeighting
from ...errors import InvalidInputError
from ...residuals.residual_set import ResidualSet
from ...training.config import LearningRateSchedule, TrainingConfig
from ...training.optimizers import OptimizerName
from ..files.lora_files import NO_FILE
from ..models.quantised_blocks import default_for_frozen_blocks
from ..sampling.training_samples import SampleRequest, require_request

KeptWeights = Literal["resident", "streamed"]
KEPT_WEIGHTS: tuple[str, ...] = get_args(KeptWeights)
GIB = 2**30
CONNECTED = ("samples", "start_from", "start_file", "memory_settings")
"""Fields that hold, or refer to, more than a number or a text."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The trainer's inputs by their ids, except the model and its residuals; defaults are those of the widgets.

    The order is that of the summary. The node's tooltips explain each one.

    Raises:
        InvalidInputError: If one is out of range or of the wrong kind.
    """

    steps: int
    learning_rate: float
    batch_size: int = 1
    accumulation: int = 1
    seed: int
    lr_schedule: LearningRateSchedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    checkpointing: bool = True
    activation_budget: float = 0.0
    loss_weighting: LossWeighting = "none"
    optimizer: OptimizerName = "AdamW"
    rank: int
    alpha: float = 0.0
    targets: LoraTargets = "attention and mlp"
    output_name: str = "loras/blockskip"
    file_format: LoraFileFormat = "diffusers"
    kept_weights: KeptWeights = "resident"
    quantize_kept: str = "off"
    save_every: int = 100
    keep_last: int = 2
    resume: bool = True
    samples: SampleRequest | None = None
    start_from: Mapping[str, Tensor] | None = None
    start_file: str = NO_FILE
    check_memory: bool = True
    memory_settings: MemorySettings | None = None
    quantize_frozen: str = default_for_frozen_blocks()
    loss_table: bool = False
    ema: float = 0.0
    tensorboard: bool = False
    correct_4bit: bool = True

    def __post_init__(self) -> None:
        self.config, self.lora  # noqa: B018 - each checks its part
        for name, value, known in (
            ("kept_weights", self.kept_weights, KEPT_WEIGHTS),
            ("file_format", self.file_format, get_args(LoraFileFormat)),
        ):
            if value not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        require_request(self.samples)
        if self.memory_settings is not None:
            require_memory_settings(self.memory_settings)

    @cached_property
    def config(self) -> TrainingConfig:
        """The settings of the training loop."""
        values = {each.name: getattr(self, each.name) for each in fields(TrainingConfig)}
        return TrainingConfig(**{**values, "activation_budget": self.activation_budget * GIB})

    @cached_property
    def lora(self) -> LoraSettings:
        """The settings of the LoRA; an alpha of 0 means the rank."""
        return LoraSettings(rank=self.rank, alpha=self.alpha or self.rank, targets=self.targets)

    def planned_for(self, residuals: ResidualSet) -> RunRequest:
        """Return the request with the settings from Memory Plan, if it is connected.

        Raises:
            InvalidInputError: If the residuals were made with other settings than the plan counted.
        """
        plan = self.memory_settings
        if plan is None:
            return self
        made = (residuals.schedule.patches.patch_min, residuals.storage == "on the fly")
        if made != (plan.patch_min, plan.storage == "on the fly"):
            raise InvalidInputError(
                f"Memory Plan counted crops of {plan.patch_min} px with storage {plan.storage}, but the residuals have "
                f"{made[0]} px and {residuals.storage}. Connect its `settings` to Precompute Residuals too."
            )
        return replace(
            self,
            batch_size=plan.config.batch_size,
            accumulation=self.accumulation * plan.config.accumulation,
            checkpointing=plan.config.checkpointing,
            activation_budget=plan.config.activation_budget / GIB,
            quantize_kept=plan.quantize_kept,
            quantize_frozen=plan.quantize_frozen if plan.frozen else self.quantize_frozen,
        )

    def memory(self, residuals: ResidualSet) -> MemorySettings:
        """Return the settings that memory depends on."""
        return MemorySettings(
            config=self.config,
            storage=residuals.storage,
            quantize_kept=self.quantize_kept,
            patch_min=residuals.schedule.patches.patch_min,
            frozen=residuals.selection.frozen,
            quantize_frozen=self.quantize_frozen,
        )

    def shown(self) -> dict[str, Any]:
        """Return every setting by its name in readable form; connected inputs are described by their origin."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "activation_budget": f"{self.activation_budget:g} GiB",
            "alpha": self.lora.alpha,
            "samples": "none" if self.samples is None else "from Sample While Training",
            "start_from": "nothing" if self.start_from is None else "another LoRA",
            "memory_settings": "none" if self.memory_settings is None else "from Memory Plan",
        }


def require_memory_settings(value: Any) -> None:
    """Raise InvalidInputError unless this is an output of Memory Plan."""
    if not isinstance(value, MemorySettings):
        raise InvalidInputError(
            f"memory_settings must come from Memory Plan's output `settings`, got a {type(value).__name__}."
        )

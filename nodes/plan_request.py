"""The request of Memory Plan: its widgets, validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ..blockskip_core.accounting.plan import MemorySettings, room_of_card
from ..blockskip_core.adapters.lora import LoraSettings, LoraTargets
from ..blockskip_core.data.reference_pictures import ReferencePart, ReferenceSettings
from ..blockskip_core.distillation.settings import DistillationSettings
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.inputs.references import checked_references
from ..blockskip_core.hosts.models.counted_run import CountedRun, room_on
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.quantised_blocks import default_for_frozen_blocks
from ..blockskip_core.hosts.models.reference_latents import counted_captions
from ..blockskip_core.hosts.sampling.own_latents import OwnLatents
from ..blockskip_core.hosts.sampling.patch_training import PatchTraining
from ..blockskip_core.residuals.back_response import BACK_RESIDUALS, BackResidual
from ..blockskip_core.residuals.format import RESIDUAL_FORMATS, ResidualFormat
from ..blockskip_core.residuals.residual_set import STORAGES, Storage
from ..blockskip_core.selection.selection import BlockSelection
from ..blockskip_core.training.config import TrainingConfig
from ..blockskip_core.training.optimizers import OptimizerName
from .train_patch_adapters import SIZES

GIB = 2**30
OFF = "off"


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The node's widgets by their ids; defaults are those of the widgets.

    Raises:
        InvalidInputError: If one is out of range.
    """

    patch_min: int
    draws: int
    storage: Storage
    rank: int
    batch_size: int
    checkpointing: bool
    quantize_kept: str
    activation_budget: float
    card_memory: float
    chunk_size: int = 64
    back_residual: BackResidual = "exact"
    residual_format: ResidualFormat = "exact"
    targets: LoraTargets = "attention and mlp"
    probe_size: int = 512
    preset: str = OFF
    use_spare: bool = True
    quantize_frozen: str = default_for_frozen_blocks()
    frames: int = 1
    reference_size: int = 512
    reference_part: ReferencePart = "whole"
    references_each: int = 1
    coarse_patches: str = OFF
    optimizer: OptimizerName = "AdamW"
    ema: float = 0.0

    def __post_init__(self) -> None:
        choices = {
            "storage": STORAGES, "back_residual": BACK_RESIDUALS, "residual_format": RESIDUAL_FORMATS,
            "targets": get_args(LoraTargets), "coarse_patches": (OFF, *SIZES),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("patch_min", "probe_size", "draws", "chunk_size", "references_each"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.card_memory < float("inf"):
            raise InvalidInputError(f"card_memory must not be negative, got {self.card_memory}.")

    @property
    def is_for_this_device(self) -> bool:
        """Whether the plan is for this device."""
        return self.preset == OFF and not self.card_memory

    def settings(self, selection: BlockSelection) -> MemorySettings:
        """Return the settings that memory depends on."""
        config = TrainingConfig(
            steps=1,
            batch_size=self.batch_size,
            checkpointing=self.checkpointing,
            activation_budget=self.activation_budget * GIB,
            optimizer=self.optimizer,
            learning_rate=1.0,  # what Prodigy takes; memory does not depend on it
            ema=self.ema,
        )
        return MemorySettings(
            config=config,
            storage=self.storage,
            quantize_kept=self.quantize_kept,
            patch_min=self.patch_min,
            measured=selection.method == "attention mask",
            frozen=selection.frozen,
            quantize_frozen=self.quantize_frozen,
        )

    def room(self, device: Any) -> tuple[int, str]:
        """Return the bytes that the run may use, and the name of the card."""
        if self.preset != OFF:
            return room_of_card(self.preset), f"a card with {self.preset}"
        return (round(self.card_memory * GIB), "that card") if self.card_memory else room_on(device)

    def with_references(self, dit: HostedDit, captions: Sequence[list], references: Sequence[Any]) -> list[list]:
        """Return captions that carry latents without data, of the sizes of the largest references."""
        settings = ReferenceSettings(size=self.reference_size, part=self.reference_part)
        sizes = checked_references(references, captions).sizes
        return counted_captions(
            dit.adapter, dit.patcher.model, captions, sizes, self.references_each, settings, self.patch_min
        )

    @property
    def lora(self) -> LoraSettings:
        """The LoRA's settings."""
        return LoraSettings(rank=self.rank, alpha=self.rank, targets=self.targets)

    @property
    def patch_training(self) -> PatchTraining | None:
        """The training of patch adapters that is counted too, on squares of ``patch_min``; None for none."""
        if self.coarse_patches == OFF:
            return None
        return PatchTraining(
            scales=SIZES[self.coarse_patches],
            latents=OwnLatents(per_prompt=1, width=self.patch_min, height=self.patch_min, frames=self.frames),
            settings=DistillationSettings(steps=1, batch_size=self.batch_size),
            lora=self.lora,
            checkpointing=self.checkpointing,
        )

    def counted_run(self, dit: HostedDit, selection: BlockSelection, captions: int) -> CountedRun:
        """Return an object that counts the run."""
        return CountedRun(
            dit,
            selection,
            self.lora,
            captions=captions,
            draws=self.draws,
            chunk_size=self.chunk_size,
            linear=self.back_residual == "linear",
            residual_format=self.residual_format,
            probe_size=self.probe_size,
        )

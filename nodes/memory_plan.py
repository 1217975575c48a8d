"""Memory Plan: what a run will take, before it starts."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from comfy_api.latest import io

from ..blockskip_core.accounting.memory_needs import MemoryNeeds
from ..blockskip_core.accounting.plan import (
    CARDS,
    Change,
    MemorySettings,
    changes_that_fit,
    fits,
    peak_of,
    phase_peaks,
    room_of_card,
    with_spare_used,
)
from ..blockskip_core.accounting.plan_text import report
from ..blockskip_core.accounting.throughput import operations_per_second
from ..blockskip_core.adapters.lora import LoraSettings, LoraTargets
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.inputs.conditioning import flatten_conditionings
from ..blockskip_core.hosts.inputs.frames import latent_shape
from ..blockskip_core.hosts.models.counted_run import CountedRun, room_on
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.quantised_blocks import available_formats, formats_on, require_available
from ..blockskip_core.reporting.pictures import as_image, memory_bars
from ..blockskip_core.residuals.back_response import BACK_RESIDUALS
from ..blockskip_core.residuals.format import RESIDUAL_FORMATS
from ..blockskip_core.residuals.sources import STORAGES
from ..blockskip_core.training.config import TrainingConfig
from .inputs import checked, connected
from .page.progress import NodeProgress
from .types import BlockSelectionSocket, MemorySettingsSocket

GIB = 2**30
OFF = "off"


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_MemoryPlan",
            display_name="Memory Plan",
            category="BlockSkip/training",
            description=(
                "Says before a run starts how much GPU memory, host memory and disk it will take, whether that fits, and "
                "the smallest change that makes it fit. The run's own code is counted on tensors that have shapes and no "
                "memory, so nothing is loaded. Set the widgets as at the other nodes."
            ),
            search_aliases=["blockskip", "vram", "out of memory", "oom", "memory estimate", "will it fit"],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that you will train on."),
                io.Conditioning.Input("positive", tooltip="The captions; the longest decides."),
                BlockSelectionSocket.Input("selection", tooltip="From Select Blocks."),
                io.Int.Input("patch_min", default=256, min=16, max=4096, step=16, tooltip="As at Precompute Residuals."),
                io.Int.Input("draws", default=400, min=1, max=1_000_000, tooltip="As at Precompute Residuals."),
                io.Combo.Input("storage", options=list(STORAGES), default="disk", tooltip="As at Precompute Residuals."),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="As at Dynamic Patch Trainer."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="As at Dynamic Patch Trainer."),
                io.Boolean.Input("checkpointing", default=True, tooltip="As at Dynamic Patch Trainer."),
                io.Combo.Input(
                    "quantize_kept", options=available_formats(), default="off", tooltip="As at Dynamic Patch Trainer."
                ),
                io.Float.Input(
                    "activation_budget", default=0.0, min=0.0, max=1024.0, step=0.25, tooltip="As at Dynamic Patch Trainer."
                ),
                io.Float.Input(
                    "card_memory",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB that the run may take, to plan for another card. 0: what this device has free once other "
                    "models are unloaded.",
                ),
                io.Int.Input(
                    "chunk_size", default=64, min=1, max=100_000, optional=True, advanced=True,
                    tooltip="As at Precompute Residuals.",
                ),
                io.Combo.Input(
                    "back_residual", options=list(BACK_RESIDUALS), default="constant", optional=True, advanced=True,
                    tooltip="As at Precompute Residuals.",
                ),
                io.Combo.Input(
                    "residual_format", options=list(RESIDUAL_FORMATS), default="exact", optional=True, advanced=True,
                    tooltip="As at Precompute Residuals.",
                ),
                io.Combo.Input(
                    "targets", options=list(get_args(LoraTargets)), default="attention and mlp", optional=True,
                    advanced=True, tooltip="As at Dynamic Patch Trainer.",
                ),
                io.Int.Input(
                    "probe_size", default=512, min=64, max=4096, step=16, optional=True, advanced=True,
                    tooltip="As at Select Blocks; only its method attention mask needs it.",
                ),
                io.Combo.Input(
                    "preset", options=[OFF, *CARDS], default=OFF, optional=True,
                    tooltip="Plan for a card of this size; an eighth of it and 0.5 GiB are left to the desktop, the driver and "
                    "other programs. Takes precedence over `card_memory`.",
                ),
                io.Boolean.Input(
                    "use_spare", default=True, optional=True, advanced=True,
                    tooltip="Let `settings` put memory that is left to use: activations are kept instead of recomputed, "
                    "which is faster and changes nothing of the result.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The plan, for Preview as Text."),
                io.Boolean.Output("fits", display_name="fits", tooltip="Whether the run fits as it is set."),
                io.Image.Output("chart", display_name="chart", tooltip="Each phase against what there is."),
                MemorySettingsSocket.Output(
                    "settings", display_name="settings",
                    tooltip="The smallest change that fits, or what you set if that fits. For `memory_settings` of "
                    "Precompute Residuals and of Dynamic Patch Trainer.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, selection, **widgets) -> io.NodeOutput:
        model, selection = connected(model=model, selection=selection).values()
        plan = _Plan(model, flatten_conditionings(positive), selection, **checked(cls, **widgets))
        progress = NodeProgress(cls.hidden.unique_id)
        needs = plan.count(plan.settings)
        enough, found = fits(peak_of(plan.settings, needs), plan.available), None
        if not enough:
            progress("looking for what would fit", 1, 2)
            found = changes_that_fit(plan.settings, plan.available, plan.count, formats_on(plan.run.dit.device))
        settings = plan.settings_that_fit(found, enough)
        text = report(plan.settings, needs, plan.available, plan.place, found, draws=plan.draws, speed=plan.speed())
        text += f"\n\nOn the output `settings`: {settings.describe()}"
        progress.say(text.splitlines()[0])
        chart = memory_bars(phase_peaks(needs), needs.training.weights, plan.available, text.splitlines()[0])
        return io.NodeOutput(text, enough, as_image(chart), settings, ui={"text": [text]})


class _Plan:
    """A run's settings, what counts it, and the room that there is."""

    def __init__(
        self,
        model: Any,
        captions: list,
        selection: Any,
        *,
        patch_min: int,
        draws: int,
        storage: str,
        rank: int,
        batch_size: int,
        checkpointing: bool,
        quantize_kept: str,
        activation_budget: float,
        card_memory: float,
        chunk_size: int = 64,
        back_residual: str = "constant",
        residual_format: str = "exact",
        targets: str = "attention and mlp",
        probe_size: int = 512,
        preset: str = OFF,
        use_spare: bool = True,
    ) -> None:
        for name, value, known in (
            ("storage", storage, STORAGES),
            ("back_residual", back_residual, BACK_RESIDUALS),
            ("residual_format", residual_format, RESIDUAL_FORMATS),
            ("targets", targets, get_args(LoraTargets)),
        ):
            if value not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        for name, value in (
            ("patch_min", patch_min),
            ("probe_size", probe_size),
            ("draws", draws),
            ("chunk_size", chunk_size),
        ):
            if value < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {value}.")
        require_available(quantize_kept, model.load_device)
        dit = HostedDit(model, captions, latent_shape(model.model, patch_min))
        selection.require_for(len(dit.blocks), dit.family)
        self.run = CountedRun(
            dit, selection, LoraSettings(rank=rank, alpha=rank, targets=targets), captions=len(captions), draws=draws,
            chunk_size=chunk_size, linear=back_residual == "linear", residual_format=residual_format,
            probe_size=probe_size,
        )  # fmt: skip
        self.count, self._use_spare = cache(self.run.needs), use_spare
        self.settings = MemorySettings(
            config=TrainingConfig(
                steps=1, batch_size=batch_size, checkpointing=checkpointing, activation_budget=activation_budget * GIB
            ),
            storage=storage,
            quantize_kept=quantize_kept,
            patch_min=patch_min,
            measured=selection.method == "attention mask",
        )
        self.draws, self._is_here = draws, preset == OFF and not card_memory
        self.available, self.place = self._room(card_memory, preset)

    def _room(self, card_memory: float, preset: str) -> tuple[int, str]:
        """Return the bytes that the run may take, and of what."""
        if not 0.0 <= card_memory < float("inf"):
            raise InvalidInputError(f"card_memory must not be negative, got {card_memory}.")
        if preset != OFF:
            return room_of_card(preset), f"a card with {preset}"
        return (round(card_memory * GIB), "that card") if card_memory else room_on(self.run.dit.device)

    def speed(self) -> float | None:
        """Return the operations per second of this device; None if another card is planned for."""
        if not self._is_here:
            return None
        dit, shape = self.run.dit, latent_shape(self.run.dit.patcher.model, self.settings.patch_min)
        tokens = dit.image_tokens(*shape[1:]) + dit.text_tokens(0)
        return operations_per_second(dit.device, dit.dtype, dit.width, tokens * self.settings.config.batch_size)

    def settings_that_fit(self, found: tuple[list[Change], MemoryNeeds] | None, enough: bool) -> MemorySettings:
        """Return the settings with the changes that make the run fit, and what is left over put to use."""
        settings = self.settings
        for change in found[0] if found else ():
            settings = change.apply(settings)
        if self._use_spare and (enough or found):
            settings = with_spare_used(settings, self.available, self.count)
        return settings

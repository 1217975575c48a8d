"""Memory Plan: counts what a run will need, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, TypeVar

from comfy_api.latest import io

from ..blockskip_core.accounting.memory_needs import MemoryNeeds
from ..blockskip_core.accounting.plan import (
    CARDS,
    PHASES,
    MemorySettings,
    changes_that_fit,
    fits,
    largest_that_fits,
    peak_of,
    phase_peaks,
    with_spare_used,
)
from ..blockskip_core.accounting.throughput import operations_per_second
from ..blockskip_core.errors import BlockSkipError, UnsupportedModelError
from ..blockskip_core.hosts.inputs.conditioning import flatten_conditionings
from ..blockskip_core.hosts.inputs.frames import latent_shape
from ..blockskip_core.hosts.models.adapted_dit import frames_of_clip
from ..blockskip_core.hosts.models.counted_run import UncountableError, counting
from ..blockskip_core.hosts.models.hosted_dit import HostedDit
from ..blockskip_core.hosts.models.more_trained import room_for_more
from ..blockskip_core.hosts.models.quantised_blocks import formats_on, require_available
from ..blockskip_core.hosts.runs.plan_text import AsRun, Found, advice, more_trained_line, patches_line, report
from ..blockskip_core.hosts.sampling.patch_training import counted_peak
from ..blockskip_core.reporting.memory_bars import memory_bars
from ..blockskip_core.reporting.pictures import as_image
from ..blockskip_core.selection.selection import BlockSelection
from ..blockskip_core.training.optimizers import require_optimizer
from . import widgets
from .inputs import checked, connected, refusal, require_formats, single
from .page.progress import NodeProgress
from .plan_request import OFF, PlanRequest
from .train_patch_adapters import SIZES
from .types import BlockSelectionSocket, MemorySettingsSocket

PATCHES = "patch adapters"
Counted = TypeVar("Counted")
AT_SELECT = "As on Select Blocks; only its method attention mask needs it."
AT_PRECOMPUTE = "As on Precompute Residuals."
AT_TRAINER = "As on Dynamic Patch Trainer."


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_MemoryPlan",
            display_name="Will It Fit? (Memory Plan)",
            category="BlockSkip/training",
            description=(
                "Tells before a run starts how much GPU memory, host memory and disk space it will need, whether that "
                "fits, and the smallest change that makes it fit. The run's own code is counted on tensors that have "
                "shapes but no data, so nothing is loaded. Set the widgets as on the other nodes."
            ),
            search_aliases=[
                "blockskip", "vram", "low vram", "out of memory", "oom", "memory estimate", "will it fit", "6gb", "8gb", "8 GB",
                "12gb", "12 GB", "16gb", "24gb",
            ],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            inputs=[*_required_inputs(), *_card_inputs(), *_other_inputs()],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The plan, for Preview as Text."),
                io.Boolean.Output("fits", display_name="fits", tooltip="Whether the run fits with these settings."),
                io.Image.Output(
                    "chart", display_name="chart", tooltip="The peak of each phase against the available memory."
                ),
                MemorySettingsSocket.Output(
                    "settings", display_name="settings",
                    tooltip="Your settings if they fit, otherwise with the smallest change that makes them fit. "
                    "Connect to `memory_settings` of Precompute Residuals and of Dynamic Patch Trainer.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, quantize_kept: Any = None, quantize_frozen: Any = None, optimizer: Any = None
    ) -> bool | str:
        """Refuse formats that this ComfyUI lacks, and an optimiser that is not installed, when the graph is queued."""
        chosen = single(optimizer, "optimizer")

        def check() -> None:
            require_formats(quantize_kept=quantize_kept, quantize_frozen=quantize_frozen)
            if chosen is not None:
                require_optimizer(chosen)

        return refusal(check)

    @classmethod
    def execute(
        cls, model: Any, positive: Any, selection: Any, references: Any = None, **settings: Any
    ) -> io.NodeOutput:
        model, selection = connected(model=model, selection=selection).values()
        request = PlanRequest(**checked(cls, **settings))
        progress = NodeProgress(cls.hidden.unique_id, has_text=False)
        captions = flatten_conditionings(positive, with_references=True)
        plan = Plan(model, captions, selection, request, progress, references)
        shown = {"text": [plan.text], "blockskip_plan": [plan.on_node()]}
        return io.NodeOutput(plan.text, plan.fits, as_image(plan.chart()), plan.settings_that_fit, ui=shown)


def _required_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The MODEL that you will train on."),
        io.Conditioning.Input("positive", tooltip="The captions; the longest one counts."),
        BlockSelectionSocket.Input("selection", tooltip="From Select Blocks."),
        widgets.patch_min(AT_PRECOMPUTE),
        widgets.draws(AT_PRECOMPUTE),
        widgets.storage(AT_PRECOMPUTE),
        widgets.rank(AT_TRAINER),
        widgets.batch_size(AT_TRAINER),
        widgets.checkpointing(AT_TRAINER),
        widgets.quantize_kept(AT_TRAINER),
        widgets.activation_budget(AT_TRAINER),
    ]


def _card_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "card_memory", default=0.0, min=0.0, max=1024.0, step=0.5,
            tooltip="GiB that the run may use, to plan for another card. 0: what is free on this device once other "
            "models are unloaded.",
        ),
    ]  # fmt: skip


def _other_inputs() -> list[io.Input]:
    return [
        widgets.chunk_size(AT_PRECOMPUTE),
        widgets.back_residual(AT_PRECOMPUTE),
        widgets.residual_format(AT_PRECOMPUTE),
        widgets.targets(AT_TRAINER),
        widgets.probe_size(AT_SELECT),
        io.Combo.Input(
            "preset", options=[OFF, *CARDS], default=OFF, optional=True,
            tooltip="Plan for a card of this size; an eighth of it and 0.5 GiB are left for the desktop, the driver "
            "and other programs. Takes precedence over `card_memory`.",
        ),
        io.Boolean.Input(
            "use_spare", default=True, optional=True, advanced=True,
            tooltip="Let `settings` use spare memory to keep activations instead of recomputing them, which is faster "
            "and does not change the result.",
        ),
        widgets.quantize_frozen(AT_TRAINER),
        widgets.frames(AT_PRECOMPUTE),
        io.Image.Input(
            "references", optional=True,
            tooltip="For edit models: the pictures connected to Precompute Residuals under this name; the largest "
            "count.",
        ),
        widgets.reference_size(AT_PRECOMPUTE),
        widgets.reference_part(AT_PRECOMPUTE),
        io.Int.Input(
            "references_each", default=1, min=1, max=64, optional=True, advanced=True,
            tooltip="How many of `references` each picture has; ignored if none are connected.",
        ),
        io.Combo.Input(
            "coarse_patches", options=[OFF, *SIZES], default=OFF, optional=True, advanced=True,
            tooltip="Also count Train Patch Adapters (DDiT) with these `patch_sizes`. Its `lora_rank`, `lora_targets`, `batch_size`, "
            "`checkpointing` and `frames` are those above, and its pictures squares of `patch_min`.",
        ),
        widgets.optimizer(AT_TRAINER),
        widgets.ema(AT_TRAINER),
    ]  # fmt: skip


class Plan:
    """A run's settings, what they need, whether that fits, and what would fit.

    Attributes:
        run: Counts the run.
        settings: The requested settings.
        count: Settings -> what the run needs with them.
        needs: What it needs with the requested settings.
        patches: "patch adapters" -> bytes that their training needs on the device, if that is to be counted.
        fits: Whether that fits.
        found: The smallest change that makes it fit; None if nothing needs to change, or nothing helps.
        text: All of that as text for users, several lines.
    """

    def __init__(
        self,
        model: Any,
        captions: Sequence[list],
        selection: BlockSelection,
        request: PlanRequest,
        progress: NodeProgress,
        references: Sequence[Any] | None = None,
    ) -> None:
        require_available(request.quantize_kept, model.load_device)
        shape = latent_shape(model.model, request.patch_min, frames_of_clip(model, request.frames))
        dit = HostedDit(model, captions, shape)
        dit.adapter.require_rows(request.batch_size)
        if references is not None:
            dit = HostedDit(model, request.with_references(dit, captions, references), shape)
        selection.require_for(len(dit.blocks), dit.family)
        if request.back_residual == "exact":
            selection = selection.with_exact_back()
        if selection.frozen:
            require_available(request.quantize_frozen, model.load_device, "quantize_frozen")
        self._request, self.settings = request, request.settings(selection)
        self.run = request.counted_run(dit, selection, len(captions))
        self.count = cache(self.run.needs)
        self._available, self._place = request.room(self.run.dit.device)
        self.needs = _followed(lambda: self.count(self.settings))
        self.patches: dict[str, int] = {}
        if training := request.patch_training:
            both = [*captions, *captions][: max(2, len(captions))]  # the training itself holds one out
            self.patches = {PATCHES: _followed(lambda: counted_peak(model, both, None, training))}
        self.fits = fits(peak_of(self.settings, self.needs), self._available)
        self.found = None if self.fits else self._search(progress)
        self.text = self._text()

    def _search(self, progress: NodeProgress) -> Found:
        progress("looking for settings that fit", 1, 2)
        return changes_that_fit(self.settings, self._available, self.count, formats_on(self.run.dit.device))

    def _text(self) -> str:
        text = report(
            self.settings, self.needs, self._available, self._place, self.as_run, draws=self._request.draws,
            speed=self._speed(),
        )  # fmt: skip
        for peak in self.patches.values():
            text += f"\n\n{patches_line(self._request.coarse_patches, peak, self._available)}"
        if self.hint:
            text += f"\n\n{self.hint}"
        return f"{text}\n\nOn the output `settings`: {self.settings_that_fit.describe()}"

    @cached_property
    def hint(self) -> str:
        """A sentence about a choice of blocks that trains more of them, if that fits too."""
        if not (self.fits or self.found) or self._request.back_residual != "exact":
            return ""
        settings, formats = self._changed, formats_on(self.run.dit.device)
        more = room_for_more(self.run, settings, self.count(settings), self._available, formats)
        return more_trained_line(more) if more else ""

    @property
    def verdict(self) -> str:
        """The first line of the text."""
        return self.text.splitlines()[0]

    @cached_property
    def settings_that_fit(self) -> MemorySettings:
        """The settings with the changes that make the run fit, and with spare memory used if requested."""
        if self._request.use_spare and (self.fits or self.found):
            return with_spare_used(self._changed, self._available, self.count)
        return self._changed

    @property
    def _changed(self) -> MemorySettings:
        """The settings with the changes that make the run fit."""
        settings = self.settings
        for change in self.found[0] if self.found else ():
            settings = change.apply(settings)
        return settings

    @property
    def as_run(self) -> AsRun:
        """The settings on the node's output and what the run needs with them; None if nothing fits."""
        if not (self.fits or self.found):
            return None
        return self.settings_that_fit, self.count(self.settings_that_fit)

    @property
    def _skipped(self) -> list[str]:
        """The phases that this run does not have."""
        return [] if self.settings.measured else [PHASES[0]]

    def _peaks(self, needs: MemoryNeeds) -> dict[str, int]:
        """Return the peak of each phase of the run, and of the training of patch adapters if it is counted."""
        return phase_peaks(needs) | self.patches

    def chart(self) -> Any:
        """Return a picture of each phase's peak against the available memory."""
        run = self.as_run
        peaks = self._peaks(run[1]) if run and run[1] != self.needs else None
        largest = largest_that_fits(self._available)
        return memory_bars(self._peaks(self.needs), peaks, self._skipped, self._available, largest, self.verdict)

    def on_node(self) -> dict[str, Any]:
        """Return the plan's numbers, in bytes, for the bars on the node."""
        run = self.as_run
        return {
            "available": self._available,
            "largest": largest_that_fits(self._available),
            "place": self._place,
            "fits": self.fits,
            "as_set": {"peak": peak_of(self.settings, self.needs), "phases": self._peaks(self.needs)},
            "as_run": run and {"peak": peak_of(*run), "phases": self._peaks(run[1])},
            "changes": self.settings.changes_to(self.settings_that_fit),
            "skipped": self._skipped,
            "advice": "" if run else advice(None),
            "hint": self.hint,
        }

    def _speed(self) -> float | None:
        """Return the operations per second of this device, or None if the plan is for another card."""
        if not self._request.is_for_this_device:
            return None
        dit, shape = self.run.dit, latent_shape(self.run.dit.patcher.model, self.settings.patch_min)
        tokens = dit.image_tokens(*shape[1:]) + dit.text_tokens(0)
        return operations_per_second(dit.device, dit.dtype, dit.width, tokens * self.settings.config.batch_size)


def _followed(count: Callable[[], Counted]) -> Counted:
    """Return a count; a few classes of the host do not run on tensors without values.

    Raises:
        UnsupportedModelError: If this is one of them.
    """
    try:
        with counting(passed_on=BlockSkipError):
            return count()
    except UncountableError as error:
        raise UnsupportedModelError(
            f"The memory of this model's runs cannot be counted ({error}). Train it without "
            "Memory Plan; if memory runs out, skip more blocks or set `quantize_kept` on the trainer."
        ) from error

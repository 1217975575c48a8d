"""Dynamic Patches (DDiT): a MODEL whose samplers make some steps with larger patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..blockskip_core.ddit.operations import share_saved
from ..blockskip_core.ddit.plans import (
    DecidedWhileSampling,
    ErrorBudget,
    EveryOther,
    FixedScales,
    PatchPlan,
    TypedWindows,
)
from ..blockskip_core.ddit.scheduler import CRITERIA, Criterion, SchedulerSettings
from ..blockskip_core.ddit.trained_patches import TrainedPatches
from ..blockskip_core.ddit.windows import typed_windows
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches, RunRecord
from ..blockskip_core.reporting.patch_pictures import patch_strip
from ..blockskip_core.reporting.pictures import as_image
from .inputs import checked, connected, connected_if_any, refusal
from .page.progress import NodeProgress
from .types import PatchAdaptersSocket

MODES = ("every other", "windows", "auto", "off")
REPORTED_SIDE = 1024  # pixels for which the report counts operations


class DynamicPatchesNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_DDiT",
            display_name="Dynamic Patches (DDiT)",
            category="BlockSkip/sampling",
            description=(
                "Makes some steps of sampling with larger patches, on fewer tokens, with adapters from Train Patch Adapters "
                "(DDiT). Works with one of these samplers: euler, heun, dpm_2, lms, dpmpp_2m, ipndm, ipndm_v, deis, "
                "res_multistep, gradient_estimation, uni_pc, uni_pc_bh2; and with LoRAs, guidance and caches. Steps with "
                "the model's own patches are unchanged."
            ),
            search_aliases=["blockskip", "ddit", "dynamic patches", "patch size", "speed up", "fast sampling"],
            is_experimental=True,
            inputs=[*_main_inputs(), *_auto_inputs()],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For a sampler."),
                io.Image.Output(
                    "patches", display_name="patches",
                    tooltip="The patch size of every step, if `sigmas` is connected and the mode is not auto.",
                ),
                io.String.Output("report", display_name="report", tooltip="What is planned, and the operations it saves."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, mode: Any, windows: Any = "") -> bool | str:
        """Refuse windows that are not written as such when the graph is queued."""
        if None in (mode, windows):  # linked inputs are known only when the node runs
            return True

        def check() -> None:
            require_mode(mode)
            if mode == "windows":
                typed_windows(windows)

        return refusal(check)

    @classmethod
    def execute(cls, model: Any, patch_adapters: Any = None, sigmas: Any = None, **settings: Any) -> io.NodeOutput:
        request = DynamicPatchesRequest(**checked(cls, **settings))
        model = connected(model=model)["model"]
        plugged = connected_if_any(patch_adapters=patch_adapters, sigmas=sigmas)
        changed, scales, report = request.applied(model, progress=NodeProgress(cls.hidden.unique_id), **plugged)
        return io.NodeOutput(changed, as_image(patch_strip(scales, report.splitlines()[0])), report)


def _main_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model that the adapters were trained on; LoRAs may be on it."),
        io.Combo.Input(
            "mode", options=list(MODES), default="every other",
            tooltip="every other: every second step is coarse. windows: the steps in `windows`, or if that is empty as many as "
            "`error_budget` allows. auto: decided while sampling, by how fast the picture changes (the paper's way). off: the "
            "plain model.",
        ),
        io.Float.Input(
            "error_budget", default=0.1, min=0.0, max=1.0, step=0.005, round=0.0001,
            tooltip="How much error coarse steps may add, relative to the way from noise to picture, by the adapters' own "
            "table. 0: no coarse step. Only used by windows.",
        ),
        PatchAdaptersSocket.Input(
            "patch_adapters", optional=True, tooltip="From Load Patch Adapters or Train Patch Adapters (DDiT)."
        ),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="The noise levels that you sample, only for the picture and the report."
        ),
        io.String.Input(
            "windows", default="", optional=True,
            tooltip="Coarse steps and their patch sizes, like `2-9: 2, 12-14: 4`; steps count from 1. Empty: from "
            "`error_budget`.",
        ),
    ]  # fmt: skip


def _auto_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "tau", default=0.001, min=0.000001, max=1000.0, step=0.0001, round=0.000001, optional=True, advanced=True,
            tooltip="Below this change per step of 1/50 a patch is coarse enough. Larger: more coarse steps. Only used by "
            "auto.",
        ),
        io.Float.Input(
            "percentile", default=0.4, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="Which patch decides for all, from the calmest (0) to the busiest (1). Only used by auto.",
        ),
        io.Combo.Input(
            "criterion", options=list(CRITERIA), default=CRITERIA[0], optional=True, advanced=True,
            tooltip="third difference: of the clean estimate, independent of the number of steps. third difference (as "
            "published): of latents, without the two limits below. Only used by auto.",
        ),
        io.Int.Input(
            "hold", default=3, min=0, max=1000, optional=True, advanced=True,
            tooltip="Steps for which a patch size is held after a switch. Only used by auto.",
        ),
        io.Int.Input(
            "longest_run", default=6, min=0, max=1000, optional=True, advanced=True,
            tooltip="Coarse steps in a row, at most. 0: no limit. Only used by auto.",
        ),
        io.Int.Input(
            "first_own", default=1, min=0, max=1000, optional=True, advanced=True,
            tooltip="Steps with the model's own patches at the start, at least. Not used by typed windows.",
        ),
        io.Int.Input(
            "last_own", default=1, min=0, max=1000, optional=True, advanced=True,
            tooltip="Steps with the model's own patches at the end, at least. Not used by typed windows.",
        ),
    ]  # fmt: skip


def require_mode(mode: str) -> None:
    """Raise InvalidInputError for an unknown mode."""
    if mode not in MODES:
        raise InvalidInputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")


@dataclass(frozen=True, kw_only=True)
class DynamicPatchesRequest:
    """The node's widgets by their ids; defaults are those of the widgets."""

    mode: str
    error_budget: float
    windows: str = ""
    tau: float = 0.001
    percentile: float = 0.4
    criterion: Criterion = "third difference"
    hold: int = 3
    longest_run: int = 6
    first_own: int = 1
    last_own: int = 1

    def __post_init__(self) -> None:
        require_mode(self.mode)

    def applied(
        self, model: Any, *, patch_adapters: TrainedPatches | None, sigmas: Any, progress: NodeProgress
    ) -> tuple[Any, Sequence[int], str]:
        """Return the MODEL with dynamic patches, the scale of every step if it is known, and a report.

        Raises:
            InvalidInputError: If a setting is not usable, or the adapters are missing.
            PatchAdapterError: If they belong to another model.
            UnsupportedModelError: If the MODEL has a change that this cannot follow.
        """
        if self.mode == "off":
            return model, [], "Off: the plain model."
        if patch_adapters is None:
            raise InvalidInputError(
                "No patch adapters came in. Connect Load Patch Adapters or Train Patch Adapters (DDiT), or set `mode` to "
                "off."
            )
        trained, plan = patch_adapters, self.plan(patch_adapters)
        changed = DynamicPatches(model, trained, plan, lambda record: show(progress, trained, record)).patcher
        cell = changed.model.latent_format.spacial_downscale_ratio
        return (changed, *planned(plan, trained, levels_of(sigmas), cell))

    def plan(self, trained: TrainedPatches) -> PatchPlan:
        """Return how patch sizes are chosen.

        Raises:
            InvalidInputError: If a setting is out of range.
        """
        if self.mode == "auto":
            settings = SchedulerSettings(
                tau=self.tau, percentile=self.percentile, criterion=self.criterion, hold=self.hold,
                longest_run=self.longest_run, first_own=self.first_own, last_own=self.last_own,
            )  # fmt: skip
            sides = {scale: entry.coarse.resizing.side for scale, entry in trained.scales.items()}
            return DecidedWhileSampling(settings, sides)
        if self.mode == "every other":
            return EveryOther(min(trained.scales), self.first_own, self.last_own)
        if self.windows.strip():
            return TypedWindows(self.windows, sorted(trained.scales))
        if not 0.0 <= self.error_budget <= 1.0:
            raise InvalidInputError(f"error_budget must be between 0 and 1, got {self.error_budget}.")
        tables = {scale: entry.errors for scale, entry in trained.scales.items()}
        return ErrorBudget(self.error_budget, tables, trained.operations_of, self.first_own, self.last_own)


def levels_of(sigmas: Tensor | None) -> list[float] | None:
    """Return noise levels as numbers; None if there are none.

    Raises:
        InvalidInputError: If they do not fall in a row.
    """
    if sigmas is None:
        return None
    values = sigmas.tolist() if sigmas.ndim == 1 and sigmas.is_floating_point() else []
    if len(values) < 2 or not all(a > b for a, b in zip(values, values[1:], strict=False)):  # False for NaN too
        raise InvalidInputError(
            f"`sigmas` must be falling noise levels, got a tensor of shape {tuple(sigmas.shape)}. Connect a scheduler node."
        )
    return values


def planned(
    plan: PatchPlan, trained: TrainedPatches, sigmas: Sequence[float] | None, cell: int
) -> tuple[Sequence[int], str]:
    """Return the scale of every step, if it is known before sampling, and a report.

    Operations are counted for a picture of ``REPORTED_SIDE`` pixels, or for a clip of the size that adapters for clips were
    trained with.

    Args:
        plan, trained, sigmas: What was chosen, and the noise levels if they are known.
        cell: Pixels along the side of a latent cell.
    """
    of_clips = trained.notes.get("frames", 1) > 1
    tokens = trained.notes["image_tokens"] if of_clips else (REPORTED_SIDE // cell // trained.base.patch) ** 2
    operations = trained.operations_of(tokens)
    sizes = ", ".join(f"{scale}x: 1/{operations[1] / operations[scale]:.2f}" for scale in trained.scales)
    costs = (
        f"Operations of a coarse step, of one with the model's own patches, counted for {tokens} image tokens: {sizes}."
    )
    if sigmas is None:
        return [], f"The steps are chosen when sampling begins; connect `sigmas` to see them here.\n{costs}"
    choice = plan.begin(sigmas, tokens)
    if not isinstance(choice, FixedScales):
        return [], f"The steps are decided while sampling; they are shown under the node.\n{costs}"
    return choice.scales, f"{summary(choice.scales, operations)}\nPatch of every step: {steps(choice.scales)}.\n{costs}"


def summary(scales: Sequence[int], operations: dict[int, float]) -> str:
    """Return how many steps are coarse and what that saves."""
    coarse = sum(scale > 1 for scale in scales)
    return f"{coarse} of {len(scales)} steps coarse: {share_saved(scales, operations):.0%} of the operations saved."


def steps(scales: Sequence[int]) -> str:
    """Return the scale of every step on one line."""
    return " ".join(map(str, scales))


def show(progress: NodeProgress, trained: TrainedPatches, record: RunRecord) -> None:
    """Show the run so far on the node: the strip of steps, and the same as a line under it."""
    saved = summary(record.scales, trained.operations_of(record.tokens))
    done, total = len(record.scales), len(record.sigmas) - 1
    progress.show_while_another_runs(done, total, patch_strip(record.scales, saved, total))
    text = f"{saved} {steps(record.scales)}"
    if done == total:
        progress.say(text)
    else:
        progress.note(text, last=False)

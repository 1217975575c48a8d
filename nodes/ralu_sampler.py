"""RALU Sampler: samples in three stages, from coarse tokens to fine ones, starting where fine tokens matter most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import latent_preview
from comfy_api.latest import io

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.models.out_of_memory import out_of_memory_explained
from ..blockskip_core.hosts.sampling.early_regions import REGIONS, RegionChoice
from ..blockskip_core.hosts.sampling.region_adaptive import RegionAdaptiveSampler, Sampled, empty_latent
from ..blockskip_core.ralu.timestep_matching import DEFAULT_SHIFT, PRESETS, StagePlan, solved_plan
from . import widgets
from .inputs import checked, connected, connected_if_any, refusal
from .page.progress import NodeProgress

CUSTOM = "custom"


class RaluSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_RALUSampler",
            display_name="Fast Sampler (RALU Sampler)",
            category="BlockSkip/sampling",
            description=(
                "Replaces KSampler and needs a fraction of its operations: it samples at half the side first, then "
                "brings the regions with edges to full resolution, then the rest (RALU). Nothing is trained. For FLUX, "
                "Qwen-Image, Z-Image, Wan at one frame, Chroma, SD3.5 and others; the help page has the list."
            ),
            search_aliases=[
                "blockskip",
                "ralu",
                "fast sampler",
                "faster",
                "faster flux",
                "speed up flux",
                "region adaptive",
                "upsampling",
            ],
            is_experimental=True,
            inputs=[*_sampling_inputs(), *_method_inputs(), *_region_inputs(), *_custom_inputs()],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="For VAE Decode."),
                io.Image.Output(
                    "early_regions",
                    display_name="early_regions",
                    tooltip="The estimate of the first stage, with the regions that were refined early tinted.",
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Steps, tokens and noise levels of each stage."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, preset: Any, custom_steps: Any = "5, 6, 7", custom_ends: Any = "0.3, 0.45, 1"
    ) -> bool | str:
        """Refuse numbers that form no plan when the graph is queued."""
        if None in (preset, custom_steps, custom_ends):  # linked inputs are known only when the node runs
            return True
        return refusal(lambda: stage_plan(preset, custom_steps, custom_ends))

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent_image: Any, negative: Any = None, vae: Any = None, mask: Any = None,
        **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        request = RaluRequest(**checked(cls, **settings))
        model, latent_image = connected(model=model, latent_image=latent_image).values()
        found = request.sample(model, latent_image, positive, negative, **connected_if_any(vae=vae, mask=mask))
        report = request.report(found)
        NodeProgress(cls.hidden.unique_id).say(report.splitlines()[0])
        kept = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio")}
        return io.NodeOutput({**kept, "samples": found.latent}, found.overlay, report)


def _sampling_inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="A flow-matching diffusion transformer. LoRAs work in every stage."
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="The prompt. For FLUX.1-dev put Flux Guidance in front. Text only: no ControlNet, areas or "
            "reference pictures.",
        ),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent, which sets the size and the number of pictures. For FLUX.1 and SD3.5 width and "
            "height must be multiples of 32 px.",
        ),
        widgets.seed("Seeds all noise, including the noise added between stages.", control=True),
    ]  # fmt: skip


def _method_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
            tooltip="Guidance: 1 for guidance-distilled models such as FLUX.1-dev, more for models that need "
            "`negative`.",
        ),
        io.Combo.Input(
            "preset", options=[*PRESETS, CUSTOM], default="FLUX 5x",
            tooltip="Steps and noise levels as published; the number is the speed-up over 50 steps of FLUX.1-dev, or "
            "28 of SD3. custom: solved for `custom_steps` and `custom_ends`.",
        ),
    ]  # fmt: skip


def _region_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "upsample_ratio", default=0.2, min=0.0, max=1.0, step=0.01,
            tooltip="Share of the picture that is refined in the second stage. The paper uses 0.2 for FLUX 5x, FLUX 7x "
            "and SD3 3x, and 0.3 for the others.",
        ),
        io.Combo.Input(
            "regions", options=list(REGIONS), default="edges",
            tooltip="How to find the regions. edges: in the decoded estimate, needs `vae`. latent gradient: without "
            "decoding. edges (as published): ignores edges in the dark half, like the authors' code.",
        ),
        io.Conditioning.Input("negative", optional=True, tooltip="Only used when `cfg` is not 1."),
        io.Vae.Input(
            "vae", optional=True,
            tooltip="Decodes the estimate of the first stage, for finding edges and for the overlay.",
        ),
        io.Mask.Input(
            "mask", optional=True,
            tooltip="Regions to refine first. If they exceed `upsample_ratio`, all of them are refined.",
        ),
    ]  # fmt: skip


def _custom_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "custom_steps", default="5, 6, 7", optional=True, advanced=True,
            tooltip="Steps of each stage, for at most 3 stages. Only used by custom.",
        ),
        io.String.Input(
            "custom_ends", default="0.3, 0.45, 1", optional=True, advanced=True,
            tooltip="Where each stage ends: 0 is noise, 1 is the picture. The last is 1. Only used by custom.",
        ),
        io.Float.Input(
            "custom_shift", default=3.0, min=0.1, max=100.0, step=0.01, optional=True, advanced=True,
            tooltip="Shift of the schedule intended for the model. Only used by custom.",
        ),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RaluRequest:
    """The node's widgets by their ids; defaults are those of the widgets."""

    seed: int
    cfg: float
    preset: str
    upsample_ratio: float
    regions: str
    custom_steps: str = "5, 6, 7"
    custom_ends: str = "0.3, 0.45, 1"
    custom_shift: float = 3.0

    @property
    def plan(self) -> StagePlan:
        """Steps and noise levels.

        Raises:
            InvalidInputError: If the preset is not known, or the custom numbers do not form a plan.
        """
        return stage_plan(self.preset, self.custom_steps, self.custom_ends, self.custom_shift)

    def sample(
        self, model: Any, latent_image: Mapping[str, Any], positive: Any, negative: Any, *, vae: Any, mask: Any
    ) -> Sampled:
        """Sample the pictures of a LATENT.

        Raises:
            InvalidInputError: If a setting or an input is not usable.
            OutOfMemoryError: If sampling does not fit on the device.
        """
        plan = self.plan
        if negative is None and self.cfg != 1.0:
            raise InvalidInputError(
                f"cfg is {self.cfg}, but no negative came in. Connect `negative`, or set `cfg` to 1."
            )
        choice = RegionChoice(method=self.regions, ratio=self.upsample_ratio, vae=vae, mask=mask)
        with out_of_memory_explained("Sampling", "Choose a smaller size or batch for the latent."):
            return RegionAdaptiveSampler(model, plan, choice).sample(
                positive,
                negative if negative is not None else positive,
                self.cfg,
                empty_latent(model, latent_image),
                self.seed,
                batch_indices=latent_image.get("batch_index"),
                on_step=latent_preview.prepare_callback(model, sum(plan.steps)),
            )

    def report(self, sampled: Sampled) -> str:
        """Return steps, tokens and noise levels of each stage as text."""
        plan = self.plan
        shares = ", ".join(f"{steps} x {tokens}" for steps, tokens in zip(plan.steps, sampled.tokens, strict=True))
        lines = [f"{self.preset}: {sum(plan.steps)} steps. Steps and image tokens of each stage: {shares}."]
        if self.preset == CUSTOM:
            lines.append(f"Solved: h {', '.join(f'{h:.3f}' for h in plan.shifts)}; c {plan.correlation:.5f}.")
        lines += [
            f"Noise levels of stage {number}: {', '.join(f'{sigma:.4f}' for sigma in sigmas)}."
            for number, sigmas in enumerate(plan.sigmas, start=1)
        ]
        return "\n".join(lines)


def stage_plan(preset: str, custom_steps: str, custom_ends: str, custom_shift: float = DEFAULT_SHIFT) -> StagePlan:
    """Return the plan of a preset, or the one solved for the custom numbers.

    Raises:
        InvalidInputError: If the preset is not known, or the custom numbers do not form a plan.
    """
    if preset == CUSTOM:
        steps, ends = _numbers("custom_steps", custom_steps, int), _numbers("custom_ends", custom_ends, float)
        return solved_plan(steps, ends, custom_shift)
    if preset not in PRESETS:
        raise InvalidInputError(f"preset must be one of {', '.join(PRESETS)} or {CUSTOM}, got {preset!r}.")
    return PRESETS[preset]


def _numbers(name: str, text: str, kind: type[Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(f"{name} must be numbers separated by commas, got {text!r}.") from None

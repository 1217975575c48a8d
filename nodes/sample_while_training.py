"""Sample While Training: what the trainer samples, and when."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..blockskip_core.hosts.sampling.likeness import likeness_for, require_both
from ..blockskip_core.hosts.sampling.training_samples import require_guidance, sample_request
from . import widgets
from .inputs import NOT_CONNECTED, checked, connected, connected_if_any, refusal, single
from .page.progress import NodeProgress
from .types import SamplesSocket


class SampleWhileTraining(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_SampleWhileTraining",
            display_name="Sample While Training",
            category="BlockSkip/training",
            description=(
                "Tells Dynamic Patch Trainer to sample pictures with the LoRA so far while it trains, so that you can "
                "see when it is good enough. They appear on the trainer's node, beside the LoRA's file and in the "
                "summary. Sampling does not change the training."
            ),
            search_aliases=["blockskip", "preview", "sample", "validation", "training preview", "lora training"],
            is_input_list=True,
            is_experimental=True,
            inputs=[*_schedule_inputs(), *_sampler_inputs()],
            outputs=[
                SamplesSocket.Output("samples", display_name="samples", tooltip="For Dynamic Patch Trainer or Train Word."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, cfg: Any, negative: Any = NOT_CONNECTED, clip_vision: Any = NOT_CONNECTED,
        reference_images: Any = NOT_CONNECTED,
    ) -> bool | str:  # fmt: skip
        """Refuse guidance without a negative prompt, and half of what a likeness needs, when the graph is queued."""
        scale = single(cfg, "cfg")

        def check() -> None:
            if scale is not None:
                require_guidance(scale, negative is not NOT_CONNECTED)
            require_both(clip_vision is not NOT_CONNECTED, reference_images is not NOT_CONNECTED)

        return refusal(check)

    @classmethod
    def execute(
        cls, positive: Any, vae: Any, negative: Any = None, memory_budget: Any = 2.0, clip_vision: Any = None,
        reference_images: Any = None, **settings: Any,
    ) -> io.NodeOutput:  # fmt: skip
        request = checked(cls, memory_budget=memory_budget, **settings)
        steps, budget = request.pop("sampler_steps"), request.pop("memory_budget") * 2**30
        vae = connected(vae=vae)["vae"]
        encoder, progress = connected_if_any(clip_vision=clip_vision)["clip_vision"], NodeProgress(cls.hidden.unique_id)
        likeness = likeness_for(encoder, reference_images, partial(progress, "reading training pictures"))
        return io.NodeOutput(
            sample_request(positive, negative, vae=vae, steps=steps, budget_bytes=budget, likeness=likeness, **request)
        )


def _schedule_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "positive", tooltip="The prompts; each gives one picture. Use other words than in the captions. Train Word has its own."
        ),
        io.Vae.Input("vae", tooltip="The VAE of the model."),
        io.Int.Input(
            "every", default=100, min=1, max=widgets.MOST_STEPS,
            tooltip="Number of training steps between samples. The last step is always sampled.",
        ),
        io.Boolean.Input(
            "at_start", default=True, tooltip="Also sample before the first step, to compare with the plain model."
        ),
        widgets.side("width", 512, "In pixels."),
        widgets.side("height", 512, "In pixels."),
    ]  # fmt: skip


def _sampler_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "sampler_steps", default=20, min=1, max=1000, tooltip="Steps of the sampler (Euler) for each picture."
        ),
        io.Float.Input(
            "cfg", default=1.0, min=1.0, max=100.0, step=0.1, round=0.01,
            tooltip="1 for FLUX.1-dev and schnell, more for models without guidance distillation. Above 1 it needs "
            "`negative`.",
        ),
        io.Combo.Input(
            "scheduler", options=list(comfy.samplers.SCHEDULER_NAMES), default="simple",
            tooltip="How the sampler's steps are spread over the noise levels.",
        ),
        widgets.seed("Seeds the noise. It is the same every time, so that pictures can be compared."),
        io.Conditioning.Input("negative", optional=True, tooltip="Only used when `cfg` is above 1."),
        io.Float.Input(
            "memory_budget", default=2.0, min=0.0, max=1024.0, step=0.25, optional=True, advanced=True,
            tooltip="GiB of GPU memory that sampling may use on top of the training's. Weights that do not fit stay in "
            "host memory and are copied over when they are used, which is slower.",
        ),
        io.ClipVision.Input(
            "clip_vision", optional=True,
            tooltip="Load CLIP Vision, with a CLIP or DINOv2: every sample is then compared with `reference_images`.",
        ),
        io.Image.Input(
            "reference_images", optional=True,
            tooltip="The training pictures, from the same loader as at Precompute Residuals. With `clip_vision` the chart "
            "and the summary show how alike the samples are to them.",
        ),
    ]  # fmt: skip

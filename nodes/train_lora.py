"""Dynamic Patch Trainer: trains a LoRA on the kept blocks."""

from __future__ import annotations

from typing import get_args

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.adapters.lora import LoraTargets
from ..blockskip_core.adapters.lora_formats import LoraFileFormat
from ..blockskip_core.data.flow_matching import LossWeighting
from ..blockskip_core.hosts.files.lora_files import LoraModel, file_identity
from ..blockskip_core.hosts.models.quantised_blocks import available_formats
from ..blockskip_core.training.config import LearningRateSchedule
from ..blockskip_core.training.optimizers import OPTIMIZERS
from .inputs import NO_FILE, checked, connected, single
from .page.live_chart import LiveChart
from .page.progress import NodeProgress
from .run.training_run import TrainingRun
from .types import LoraModelSocket, LossMapSocket, MemorySettingsSocket, ResidualsSocket, SamplesSocket


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_TrainLora",
            display_name="Dynamic Patch Trainer",
            category="BlockSkip/training",
            description=(
                "Trains a LoRA with most of the model left out (DiT-BlockSkip). Only the blocks in the middle are "
                "loaded and run; what the others would do comes from Precompute Residuals. The model that you loaded "
                "is used as it is and is not changed or copied. The LoRA is saved to output/loras."
            ),
            search_aliases=["blockskip", "dit-blockskip", "train lora", "lora trainer", "dreambooth", "finetune"],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The same MODEL as at Precompute Residuals."),
                ResidualsSocket.Input("residuals", tooltip="From Precompute Residuals."),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps. 500 is reported for the paper (batch 1, accumulation 4).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=1e-8,
                    tooltip="AdamW's learning rate. 1e-4 is reported for the paper; tiny models take more.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=1024, tooltip="Rank of the LoRA: 8 to 32 is usual for one subject."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides the LoRA's first values.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    optional=True,
                    advanced=True,
                    tooltip="The LoRA acts with alpha / rank. 0 means the same as the rank.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(get_args(LoraTargets)),
                    default="attention and mlp",
                    optional=True,
                    advanced=True,
                    tooltip="Which linear layers of the kept blocks learn. `all linear` adds the modulation layers. "
                    "FLUX's single blocks fuse attention and MLP, so there the first three are the same.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    optional=True,
                    tooltip="Draws per forward pass. More needs more memory.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Forward passes per optimiser step: like a larger batch, at no memory. The paper is "
                    "reported to use 4.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=list(get_args(LearningRateSchedule)),
                    default="constant",
                    optional=True,
                    advanced=True,
                    tooltip="How the learning rate changes over the run.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    advanced=True,
                    tooltip="Steps in which the learning rate rises. Not read by `constant`.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Gradients longer than this are shortened. 0 turns that off.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="AdamW's weight decay.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    optional=True,
                    tooltip="Recompute activations instead of keeping them: much less memory, and slower by the time of one more forward pass.",
                ),
                io.Combo.Input(
                    "loss_weighting",
                    options=list(get_args(LossWeighting)),
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="Weight of each noise level in the loss. none: the plain velocity loss of the model.",
                ),
                io.String.Input(
                    "output_name",
                    default="loras/blockskip",
                    optional=True,
                    tooltip="Where the LoRA is saved, below ComfyUI's output folder; a number is added. Files in "
                    "`loras/` show up in Load LoRA.",
                ),
                io.Combo.Input(
                    "file_format",
                    options=list(get_args(LoraFileFormat)),
                    default="diffusers",
                    optional=True,
                    advanced=True,
                    tooltip="Names inside the file. All load in ComfyUI. diffusers: load in diffusers too, except for "
                    "Lumina 2. peft: ComfyUI's own layer names; in diffusers for FLUX.2, Qwen-Image and Wan. kohya: for "
                    "programs that read kohya's files; in diffusers for FLUX.1, FLUX.2, Chroma, Qwen-Image and Z-Image.",
                ),
                io.Float.Input(
                    "activation_budget",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.25,
                    optional=True,
                    advanced=True,
                    tooltip="GiB that `checkpointing` may leave unused: so much is kept instead of recomputed, which "
                    "is faster. 0 recomputes everything and needs the least memory.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    default="AdamW",
                    optional=True,
                    advanced=True,
                    tooltip="The 8-bit one keeps its state in a quarter of the memory and needs the Python package "
                    "bitsandbytes. A LoRA's state is small: about 150 MiB at rank 16 on FLUX.1's last 28 blocks.",
                ),
                io.Combo.Input(
                    "kept_weights",
                    options=["resident", "streamed"],
                    default="resident",
                    optional=True,
                    advanced=True,
                    tooltip="resident: the kept blocks stay on the GPU. streamed: each layer's weights are brought "
                    "there when it runs; the least memory, and much slower. With ComfyUI's dynamic VRAM the host pages "
                    "weights by itself, and this changes little.",
                ),
                io.Combo.Input(
                    "quantize_kept",
                    options=available_formats(),
                    default="off",
                    optional=True,
                    advanced=True,
                    tooltip="Quantise the kept blocks' linear weights for this run, in ComfyUI's own formats: less GPU "
                    "memory, a less exact base. Your MODEL stays as it is. fp8 and int8 take half of bf16, 4-bit "
                    "(NVFP4) a bit more than a quarter. Weights that are quantised already are left as they are.",
                ),
                io.Int.Input(
                    "save_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="Steps between two safe points: the LoRA so far, beside the final file, and the training "
                    "state to go on from. 0: only when the run ends, by itself or by Cancel.",
                ),
                io.Int.Input(
                    "keep_last",
                    default=2,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="So many of the newest safe points stay on disk.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    optional=True,
                    tooltip="Queueing the same graph again goes on where an interrupted run stopped, and ends with the "
                    "same LoRA. More steps go on from a finished run. Off: start from the beginning.",
                ),
                LoraModelSocket.Input(
                    "start_from",
                    optional=True,
                    tooltip="A LoRA to train further, from another Dynamic Patch Trainer in the graph. Takes precedence "
                    "over `start_file`.",
                ),
                io.Combo.Input(
                    "start_file",
                    options=[NO_FILE, *folder_paths.get_filename_list("loras")],
                    default=NO_FILE,
                    optional=True,
                    advanced=True,
                    tooltip="A LoRA file to train further, of any trainer whose names ComfyUI reads. `rank` must be at "
                    "least its rank, and it must change nothing but linear layers of the kept blocks.",
                ),
                SamplesSocket.Input(
                    "samples",
                    optional=True,
                    tooltip="From Sample While Training: pictures while it trains.",
                ),
                MemorySettingsSocket.Input(
                    "memory_settings",
                    optional=True,
                    tooltip="From Memory Plan. Takes precedence over `batch_size`, `checkpointing`, `activation_budget` and "
                    "`quantize_kept`. Connect it to Precompute Residuals too.",
                ),
                io.Boolean.Input(
                    "check_memory",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Refuse a run that cannot fit, before it starts, and say what would make it fit. Off: only "
                    "warn.",
                ),
            ],
            outputs=[
                LoraModelSocket.Output(
                    "lora",
                    display_name="lora",
                    tooltip="For Apply BlockSkip LoRA, or core's Load LoRA Model and Save LoRA.",
                ),
                LossMapSocket.Output("loss_map", display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Int.Output("steps", display_name="steps", tooltip="Optimiser steps done."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, start_file=(NO_FILE,), **_others) -> str:
        """Run again when the file to start from has changed; ComfyUI only sees its name."""
        return file_identity(start_file[0])

    @classmethod
    def execute(cls, model, residuals, start_from=None, samples=None, **widgets) -> io.NodeOutput:
        model, residuals = connected(model=model, residuals=residuals).values()
        samples = single(samples, "samples")
        start_from = None if start_from is None else connected(start_from=start_from)["start_from"]
        with LiveChart(cls.hidden) as chart:
            progress = NodeProgress(cls.hidden.unique_id, chart.phase)
            run = TrainingRun(model, residuals, progress, chart, start_from, samples, **checked(cls, **widgets))
            run.train()
        run.say_how_it_went()
        lora = LoraModel(run.host_lora(), run.metadata())
        ui = {"blockskip": [run.summary()], **chart.output(), **(run.samples.output() if run.samples else {})}
        return io.NodeOutput(lora, run.loss_map(), run.result.steps, ui=ui)

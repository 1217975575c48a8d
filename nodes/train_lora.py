"""Dynamic Patch Trainer: trains a LoRA on the kept blocks."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..blockskip_core.adapters.lora_formats import LoraFileFormat
from ..blockskip_core.data.flow_matching import LossWeighting
from ..blockskip_core.hosts.files.lora_files import EXAMPLE_NAME, file_identity
from ..blockskip_core.hosts.files.names import name_below
from ..blockskip_core.hosts.runs.request import KEPT_WEIGHTS, RunRequest
from ..blockskip_core.reporting.event_files import require_tensorboard
from ..blockskip_core.training.config import LearningRateSchedule
from ..blockskip_core.training.optimizers import require_optimizer
from . import widgets
from .inputs import NO_FILE, checked, connected, connected_if_any, refusal, require_formats, single
from .page.live_chart import LiveChart
from .page.progress import NodeProgress
from .run.training import run_training
from .types import LoraModelSocket, LossMapSocket, ResidualsSocket, SamplesSocket


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_TrainLora",
            display_name="Train LoRA (Dynamic Patch Trainer)",
            category="BlockSkip/training",
            description=(
                "Trains a LoRA with part of the model left out (DiT-BlockSkip). Skipped blocks are not loaded: Precompute "
                "Residuals supplies what they would contribute. By default the first quarter is skipped, and the last "
                "half runs frozen. The model that you loaded is not changed or copied. The LoRA is saved to output/loras."
            ),
            search_aliases=[
                "blockskip", "dit-blockskip", "train lora", "lora training", "lora trainer", "train flux", "flux lora", "character lora",
                "dreambooth", "finetune", "low vram", "8gb", "8 GB", "12gb", "12 GB", "faster training",
            ],
            is_input_list=True,
            is_output_node=True,
            is_experimental=True,
            # Saved workflows store widget values by position: new inputs go to the end.
            inputs=[*training_inputs(), *later_inputs()],
            outputs=[
                LoraModelSocket.Output(
                    "lora", display_name="lora",
                    tooltip="For Apply BlockSkip LoRA, or core's Load LoRA Model and Save LoRA.",
                ),
                LossMapSocket.Output("loss_map", display_name="loss_map", tooltip="For core's Plot Loss Graph."),
                io.Int.Output("steps", display_name="steps", tooltip="Optimiser steps done."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, output_name: Any = None, tensorboard: Any = None, optimizer: Any = None, quantize_kept: Any = None,
        quantize_frozen: Any = None,
    ) -> bool | str:  # fmt: skip
        """Refuse a name that cannot be saved, and what is not installed, when the graph is queued, not after precomputing."""
        name, chosen = single(output_name, "output_name"), single(optimizer, "optimizer")

        def check() -> None:
            if name is not None:
                name_below(name, EXAMPLE_NAME)
            if single(tensorboard, "tensorboard") is True:
                require_tensorboard()
            if chosen is not None:
                require_optimizer(chosen)
            require_formats(quantize_kept=quantize_kept, quantize_frozen=quantize_frozen)

        return refusal(check)

    @classmethod
    def fingerprint_inputs(cls, start_file: Any = (NO_FILE,), **_others: Any) -> str:
        """Run again when the file to start from has changed; ComfyUI only sees its name."""
        return file_identity(start_file[0])

    @classmethod
    def execute(
        cls, model: Any, residuals: Any, start_from: Any = None, samples: Any = None, **settings: Any
    ) -> io.NodeOutput:
        model, residuals = connected(model=model, residuals=residuals).values()
        plugged = {**connected_if_any(start_from=start_from), "samples": single(samples, "samples")}
        with LiveChart(cls.hidden) as chart:
            request = RunRequest(**plugged, **checked(cls, **settings))
            progress = NodeProgress(cls.hidden.unique_id, chart.phase, has_text=False)
            trained = run_training(model, residuals, request, progress, chart)
        return io.NodeOutput(trained.lora, trained.loss_map, trained.steps, ui={**trained.ui, **chart.output()})


def training_inputs() -> list[io.Input]:
    """Return the inputs of a training, also for nodes that only write it down."""
    return [
        *_required_inputs(), *_adapter_inputs(), *_step_inputs(), *_file_inputs(), *_memory_inputs(), *_checkpoint_inputs(),
        *_other_inputs(),
    ]  # fmt: skip


def later_inputs() -> list[io.Input]:
    """Return the inputs of a training that came after nodes with further inputs of their own."""
    return [
        widgets.ema(
            "Decay of a moving average of the LoRA, which is then saved and sampled in place of its last "
            "values: 0.99 averages at most about the last 100 steps. 0: off."
        ),
        io.Boolean.Input(
            "tensorboard", default=False, optional=True, advanced=True,
            tooltip="Also write losses, learning rate, memory, likeness and samples for TensorBoard, into the folder "
            "`tensorboard` beside the LoRA. Needs the Python package tensorboard.",
        ),
        io.Boolean.Input(
            "correct_4bit", default=True, optional=True, advanced=True,
            tooltip="Only used if blocks are in 4-bit. Before training, every example also goes through the model as loaded once, "
            "and what 4-bit changes there is undone in every step: the LoRA then learns nearly as much as with 8 bits.",
        ),
    ]  # fmt: skip


def _required_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The same MODEL as at Precompute Residuals."),
        ResidualsSocket.Input("residuals", tooltip="From Precompute Residuals."),
        io.Int.Input(
            "steps", default=500, min=1, max=widgets.MOST_STEPS,
            tooltip="Optimiser steps. 500 is reported for the paper (batch 1, accumulation 4).",
        ),
        io.Float.Input(
            "learning_rate", default=2e-4, min=1e-8, max=1.0, step=1e-6, round=1e-8,
            tooltip="The optimiser's learning rate. 2e-4 for `skip and freeze` of Select Blocks, where few blocks are trained; "
            "1e-4 for more blocks, as is reported for the paper; tiny models take more. 1 for Prodigy.",
        ),
        widgets.rank("Rank of the LoRA: 8 to 32 is usual for one subject."),
        widgets.seed("Determines the LoRA's initial values."),
    ]  # fmt: skip


def _adapter_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "alpha", default=0.0, min=0.0, max=1024.0, step=0.5, optional=True, advanced=True,
            tooltip="The LoRA is scaled by alpha / rank. 0 means the same as the rank.",
        ),
        widgets.targets(
            "Which linear layers of the kept blocks are trained. `all linear` adds the modulation layers. FLUX's "
            "single blocks fuse attention and MLP, so there the first three are the same."
        ),
    ]  # fmt: skip


def _step_inputs() -> list[io.Input]:
    return [
        widgets.batch_size("Training examples per forward pass. More needs more memory.", optional=True),
        io.Int.Input(
            "accumulation", default=1, min=1, max=256, optional=True, advanced=True,
            tooltip="Forward passes per optimiser step: like a larger batch, without more memory. The paper is "
            "reported to use 4.",
        ),
        io.Combo.Input(
            "lr_schedule", options=list(get_args(LearningRateSchedule)), default="constant", optional=True, advanced=True,
            tooltip="How the learning rate changes over the run.",
        ),
        io.Int.Input(
            "warmup_steps", default=0, min=0, max=100_000, optional=True, advanced=True,
            tooltip="Number of steps over which the learning rate rises. Ignored by `constant`.",
        ),
        io.Float.Input(
            "max_grad_norm", default=1.0, min=0.0, max=1000.0, step=0.1, optional=True, advanced=True,
            tooltip="Gradients are clipped to this norm. 0 turns clipping off.",
        ),
        io.Float.Input(
            "weight_decay", default=0.01, min=0.0, max=1.0, step=0.001, optional=True, advanced=True,
            tooltip="The optimiser's weight decay.",
        ),
        widgets.checkpointing(
            "Recompute activations instead of keeping them: much less memory, but each step takes one more forward "
            "pass.",
            optional=True, advanced=True,
        ),
        io.Combo.Input(
            "loss_weighting", options=list(get_args(LossWeighting)), default="none", optional=True, advanced=True,
            tooltip="Weight of each noise level in the loss. none: the plain velocity loss of the model.",
        ),
    ]  # fmt: skip


def _file_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "output_name", default="loras/blockskip", optional=True,
            tooltip="Where the LoRA is saved, below ComfyUI's output folder; a number is appended. Files in `loras/` "
            "appear in Load LoRA.",
        ),
        io.Combo.Input(
            "file_format", options=list(get_args(LoraFileFormat)), default="diffusers", optional=True, advanced=True,
            tooltip="Layer names in the file. ComfyUI loads all of them. diffusers: also loads in diffusers for most families, "
            "not for Lumina 2, AuraFlow, HunyuanVideo and Kandinsky 5. peft: ComfyUI's own layer names; load in diffusers for "
            "FLUX.2, Qwen-Image and Wan. kohya: for programs that read kohya's files; load in diffusers for FLUX.1, FLUX.2, "
            "Chroma, Qwen-Image and Z-Image.",
        ),
    ]  # fmt: skip


def _memory_inputs() -> list[io.Input]:
    return [
        widgets.activation_budget(
            "GiB of activations to keep instead of recomputing them when `checkpointing` is on, which is faster. "
            "0 recomputes everything and needs the least memory.",
            optional=True, advanced=True,
        ),
        widgets.optimizer(
            "The 8-bit version keeps its state in a quarter of the memory and needs the Python package "
            "bitsandbytes. Adafactor keeps hardly any. A LoRA's state is small: about 150 MiB at rank 16 on FLUX.1's "
            "last 28 blocks. Prodigy finds its step size itself, keeps twice as much and needs the Python package "
            "prodigyopt; `learning_rate` multiplies it, so set that to 1."
        ),
        io.Combo.Input(
            "kept_weights", options=list(KEPT_WEIGHTS), default="resident", optional=True, advanced=True,
            tooltip="resident: the kept blocks stay on the GPU. streamed: each layer's weights are copied there when "
            "it runs, which needs the least memory and is much slower. With dynamic VRAM ComfyUI pages weights by "
            "itself, and this changes little.",
        ),
        widgets.quantize_kept(
            "Quantise the kept blocks' linear weights for this run, in ComfyUI's own formats: less GPU memory, a less "
            "exact base. Your MODEL is not changed. fp8 and int8 take half of bf16, 4-bit (NVFP4) a bit more than a "
            "quarter. Weights in eight bits are packed again only by 4-bit; those in four bits are left unchanged.",
            optional=True, advanced=True,
        ),
    ]  # fmt: skip


def _checkpoint_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "save_every", default=100, min=0, max=widgets.MOST_STEPS, optional=True,
            tooltip="Number of steps between checkpoints: the LoRA so far, beside the final file, and the training "
            "state to resume from. 0: only when the run ends, by itself or by Cancel.",
        ),
        io.Int.Input(
            "keep_last", default=2, min=1, max=1000, optional=True, advanced=True,
            tooltip="How many of the newest checkpoints to keep on disk.",
        ),
        io.Boolean.Input(
            "resume", default=True, optional=True,
            tooltip="Queueing the same graph again resumes an interrupted run where it stopped, and gives the same "
            "LoRA. With more steps it continues a finished run. Off: start from the beginning.",
        ),
    ]  # fmt: skip


def _other_inputs() -> list[io.Input]:
    return [
        LoraModelSocket.Input(
            "start_from", optional=True,
            tooltip="A LoRA to train further, from another Dynamic Patch Trainer in the graph. Takes precedence over "
            "`start_file`.",
        ),
        widgets.lora_file(
            "start_file",
            "A LoRA file to train further, from any trainer whose names ComfyUI reads. `rank` must be at least the "
            "file's, and the file must only change linear layers of the kept blocks.",
            advanced=True,
        ),
        SamplesSocket.Input(
            "samples", optional=True, tooltip="From Sample While Training: pictures during training."
        ),
        widgets.memory_settings(
            "From Memory Plan. Takes precedence over `batch_size`, `checkpointing`, `activation_budget`, `quantize_kept` and "
            "`quantize_frozen`, which it sets to 4-bit if nothing milder fits; that widget then still shows your own value. "
            "Connect it to Precompute Residuals too."
        ),
        io.Boolean.Input(
            "check_memory", default=True, optional=True, advanced=True,
            tooltip="Refuse a run that cannot fit before it starts, and say what would make it fit. Off: only warn.",
        ),
        widgets.quantize_frozen(
            "Only used if the selection has frozen blocks (`skip and freeze`, or `back_residual` exact): the format of their "
            "weights for this run. They have no adapters, so they can be coarser than the others."
        ),
        io.Boolean.Input(
            "loss_table", default=False, optional=True, advanced=True,
            tooltip="Also write the loss of every step beside the LoRA, as a .csv for spreadsheets.",
        ),
    ]  # fmt: skip

"""Apply BlockSkip LoRA: patches a trained LoRA onto a model, and shows what it says of itself."""

from __future__ import annotations

import math

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.adapters.lora_metadata import describe
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.files.applied_lora import apply_lora
from ..blockskip_core.hosts.files.lora_files import file_identity, load_lora_file
from .inputs import NO_FILE, checked, connected
from .types import LoraModelSocket


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlockSkip_ApplyLora",
            display_name="Apply BlockSkip LoRA",
            category="BlockSkip/training",
            description=(
                "Applies a LoRA to a model, straight from the trainer or from a file, and shows what it was trained "
                "on. Sampling uses the whole model: nothing is skipped. Any LoRA that ComfyUI can load works."
            ),
            search_aliases=["blockskip", "load lora", "lora loader", "lora info", "lora metadata"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the LoRA to."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts. 1 is as trained, 0 is the plain model.",
                ),
                LoraModelSocket.Input(
                    "lora", optional=True, tooltip="From Dynamic Patch Trainer. Takes precedence over `lora_name`."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_FILE, *folder_paths.get_filename_list("loras")],
                    default=NO_FILE,
                    optional=True,
                    tooltip="A file from the loras folders; the trainer saves to output/loras.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA."),
                io.String.Output("info", display_name="info", tooltip="What the LoRA says of itself."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=NO_FILE, **_others) -> str:
        """Run again when the chosen file has changed; ComfyUI sees the other inputs, and that its name is the same."""
        return file_identity(lora_name)

    @classmethod
    def execute(cls, model, strength_model, lora=None, lora_name=NO_FILE) -> io.NodeOutput:
        values = checked(cls, strength_model=strength_model, lora_name=lora_name)
        strength_model, lora_name = values["strength_model"], values["lora_name"]
        model = connected(model=model)["model"]
        if not math.isfinite(strength_model):
            raise InvalidInputError(f"strength_model must be a finite number, got {strength_model}.")
        if lora is None:
            if lora_name == NO_FILE:
                raise InvalidInputError("No LoRA was given. Connect `lora` from the trainer, or choose `lora_name`.")
            lora = load_lora_file(lora_name)
        lora = connected(lora=lora)["lora"]
        applied = apply_lora(model, lora, strength_model)
        info = describe(getattr(lora, "metadata", {}), len(lora), applied.num_patched, applied.passed_over)
        return io.NodeOutput(model if strength_model == 0.0 else applied.model, info)

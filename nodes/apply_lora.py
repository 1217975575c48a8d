"""Apply BlockSkip LoRA: patches a trained LoRA onto a model, and shows its metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..blockskip_core.adapters.lora_metadata import describe
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.files.applied_lora import apply_lora
from ..blockskip_core.hosts.files.lora_files import file_identity, load_lora_file, require_lora_file
from . import widgets
from .inputs import NO_FILE, NOT_CONNECTED, checked, connected, refusal
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
            search_aliases=[
                "blockskip",
                "load lora",
                "lora loader",
                "lora info",
                "lora metadata",
                "flux lora",
                "character lora",
            ],
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
                widgets.lora_file("lora_name", "A file from the loras folders; the trainer saves to output/loras."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA."),
                io.String.Output("info", display_name="info", tooltip="The LoRA's metadata, and how it was applied."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: Any = NO_FILE, lora: Any = NOT_CONNECTED) -> bool | str:
        """Refuse a graph without a LoRA, or with a file that is gone, when it is queued."""
        if lora_name is None or lora is not NOT_CONNECTED:  # a linked input is None at that time
            return True
        return refusal(lambda: require_lora(lora_name))

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = NO_FILE, **_others: Any) -> str:
        """Run again when the chosen file has changed; ComfyUI compares its name but not its content."""
        return file_identity(lora_name)

    @classmethod
    def execute(cls, model: Any, strength_model: Any, lora: Any = None, lora_name: Any = NO_FILE) -> io.NodeOutput:
        values = checked(cls, strength_model=strength_model, lora_name=lora_name)
        model = connected(model=model)["model"]
        return io.NodeOutput(*applied(model, lora, **values))


def applied(model: Any, lora: Mapping[str, Any] | None, *, strength_model: float, lora_name: str) -> tuple[Any, str]:
    """Return the MODEL with the LoRA patched in, and a description of the LoRA.

    Raises:
        InvalidInputError: If there is no LoRA, or the strength is not finite.
        LoraFileError: If it does not fit the model, or its file cannot be read.
    """
    if not math.isfinite(strength_model):
        raise InvalidInputError(f"strength_model must be a finite number, got {strength_model}.")
    if lora is None:
        require_lora(lora_name)
        lora = load_lora_file(lora_name)
    lora = connected(lora=lora)["lora"]
    patched, num_patched, passed_over = apply_lora(model, lora, strength_model)
    info = describe(getattr(lora, "metadata", {}), len(lora), num_patched, passed_over)
    return model if strength_model == 0.0 else patched, info


def require_lora(lora_name: str) -> None:
    """Raise an error unless a LoRA file is chosen and there."""
    if lora_name == NO_FILE:
        raise InvalidInputError("No LoRA was given. Connect `lora` from the trainer, or choose `lora_name`.")
    require_lora_file(lora_name)

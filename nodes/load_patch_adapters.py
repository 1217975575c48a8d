"""Load Patch Adapters: reads a file that Train Patch Adapters (DDiT) has saved."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.ddit.trained_patches import TrainedPatches
from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.hosts.files.lora_files import file_identity
from ..blockskip_core.hosts.files.patch_adapter_files import load_patch_adapters, require_patch_adapters
from .inputs import NO_FILE, checked, refusal
from .types import PatchAdaptersSocket


class LoadPatchAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("loras")
        return io.Schema(
            node_id="BlockSkip_LoadPatchAdapters",
            display_name="Load Patch Adapters",
            category="BlockSkip/sampling",
            description=(
                "Loads patch adapters that Train Patch Adapters (DDiT) has saved, for Dynamic Patches (DDiT). They belong "
                "to one model and are refused on another."
            ),
            search_aliases=["blockskip", "ddit", "dynamic patches", "patch adapters"],
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "file", options=[NO_FILE, *files], default=NO_FILE,
                    tooltip="A file from the loras folders; Train Patch Adapters (DDiT) saves to output/loras. R refreshes "
                    "the list.",
                ),
            ],
            outputs=[
                PatchAdaptersSocket.Output(
                    "patch_adapters", display_name="patch_adapters", tooltip="For Dynamic Patches (DDiT)."
                ),
                io.String.Output("info", display_name="info", tooltip="What they were trained for, and their errors."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: Any = NO_FILE) -> bool | str:
        """Refuse a graph without a file, or with one that is gone, when it is queued; a linked one is None then."""
        return True if file is None else refusal(lambda: require_chosen(file))

    @classmethod
    def fingerprint_inputs(cls, file: Any = NO_FILE, **_others: Any) -> str:
        """Run again when the chosen file has changed; ComfyUI compares its name but not its content."""
        return file_identity(file)

    @classmethod
    def execute(cls, file: Any) -> io.NodeOutput:
        trained = chosen(checked(cls, file=file)["file"])
        return io.NodeOutput(trained, description(trained))


def require_chosen(file: str) -> None:
    """Raise InvalidInputError if no file was chosen, and PatchAdapterError if it is gone."""
    if file == NO_FILE:
        raise InvalidInputError("No file was chosen. Train adapters first, then choose their file in `file`.")
    require_patch_adapters(file)


def chosen(file: str) -> TrainedPatches:
    """Return the adapters of a file.

    Raises:
        InvalidInputError: If none was chosen.
        PatchAdapterError: If it cannot be read as one.
    """
    require_chosen(file)
    return load_patch_adapters(file)


def description(trained: TrainedPatches) -> str:
    """Return what adapters were trained for, and their errors, as several lines."""
    lines = [f"For a {trained.base.family} model with patches of {trained.base.patch} cells."]
    for scale, entry in trained.scales.items():
        lines.append(
            f"{scale}x: {entry.num_parameters} parameters after {entry.steps} steps; relative error of the velocity on "
            f"held-out prompts {entry.errors.mean:.3f}, without training {entry.fallback.mean:.3f}. By noise level: "
            + ", ".join(f"{sigma:.2f}: {error:.3f}" for sigma, error in zip(entry.errors.sigmas, entry.errors.errors,
                                                                          strict=True)) + "."
        )  # fmt: skip
    lines.extend(f"{name.replace('_', ' ')}: {value}" for name, value in sorted(trained.notes.items()))
    return "\n".join(lines)

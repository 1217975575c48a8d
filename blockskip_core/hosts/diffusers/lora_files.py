"""A trained LoRA as a file that ``pipeline.load_lora_weights`` reads."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from ...adapters.lora_formats import LayerPart, to_file_tensors
from ...adapters.lora_metadata import metadata_to_strings
from ...api import Lora
from ...files import write_atomically


def save_lora(lora: Lora, path: Path | str) -> None:
    """Write a LoRA under diffusers' names, "transformer.<layer>.lora_A/B.weight", completely or not at all.

    ComfyUI's loader reads it too where it knows diffusers' names for the family's layers, as for FLUX.1.

    Args:
        lora: Trained on a :class:`~.diffusers_dit.DiffusersDit`.
        path: The file.

    Raises:
        StorageError: If the disk cannot be written.
    """
    adapters, settings = lora.adapters, lora.adapters.settings
    own_names = {name: [LayerPart(name, 0, len(adapters.up(name)))] for name in adapters.names}
    tensors = to_file_tensors(adapters.state_dict(), adapters.scale, "diffusers", own_names)
    facts = {
        "steps": lora.result.steps,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "family": lora.selection.family,
    }
    strings = metadata_to_strings(facts)
    write_atomically(Path(path), lambda file: save_file(tensors, file, strings))

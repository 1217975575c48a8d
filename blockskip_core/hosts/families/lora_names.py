"""Names of a model's layers in a LoRA file, and the programs that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora

from ...adapters.lora_formats import LayerPart, LoraFileFormat
from .base import FamilyAdapter

_PREFIX = "transformer."


@dataclass(frozen=True)
class FileNames:
    """How a LoRA's layers are named in a file.

    Attributes:
        in_diffusers: Layer -> diffusers' corresponding layers; None to keep the host's own names.
        loads_in: Programs that read the file, as shown to users.
    """

    in_diffusers: Mapping[str, Sequence[LayerPart]] | None
    loads_in: str


def file_names(
    model: Any, adapter: FamilyAdapter, num_rows: Mapping[str, int], file_format: LoraFileFormat
) -> FileNames:
    """Return the names for a model's LoRA in a file format.

    Args:
        model: A BaseModel of the host, weightless or not, with none of its blocks replaced.
        adapter: Its family's adapter.
        num_rows: Layers that the LoRA changes, by their names below the diffusion model -> rows of their weights.
        file_format: The user's choice. "diffusers" uses diffusers' own names where the host reads them too, and the
            host's where diffusers reads those.
    """
    found = None
    if file_format == "diffusers" and adapter.has_names_of_diffusers:
        found = names_in_diffusers(model, num_rows)
        file_format = file_format if found else "peft"
    return FileNames(found, "ComfyUI, diffusers" if file_format in adapter.read_by_diffusers else "ComfyUI")


def names_in_diffusers(model: Any, num_rows: Mapping[str, int]) -> Mapping[str, Sequence[LayerPart]] | None:
    """Return layer -> diffusers' corresponding layers; None if the host does not know them for every layer.

    The host's own table is inverted, so the host can read what we write. Where it has several names for one layer, the
    first is used: the first names are FLUX.1's, the later ones FLUX.2's.
    """
    found: dict[str, list[LayerPart]] = {name: [] for name in num_rows}
    for alias, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, part, *moved = (target, None) if isinstance(target, str) else target
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if name not in found or moved or not alias.startswith(_PREFIX):
            continue
        first_row, rows = (0, num_rows[name]) if part is None else part[1:]
        if first_row == _end(found[name]) < num_rows[name]:
            found[name].append(LayerPart(alias.removeprefix(_PREFIX), first_row, rows))
    return found if all(_end(parts) == num_rows[name] for name, parts in found.items()) else None


def _end(parts: Sequence[LayerPart]) -> int:
    return parts[-1].first_row + parts[-1].num_rows if parts else 0

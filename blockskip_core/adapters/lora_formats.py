"""LoRA tensors under the names that the host and files use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PREFIX = "diffusion_model."
LoraFileFormat = Literal["diffusers", "peft", "kohya"]


@dataclass(frozen=True)
class LayerPart:
    """Some rows of a layer that another program stores as a separate layer.

    Attributes:
        name: The separate layer's name in the other program.
        first_row, num_rows: Its rows in the weight of our layer.
    """

    name: str
    first_row: int
    num_rows: int


def to_host_lora(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return peft tensors in the form of ComfyUI's own trainer: lora_up, lora_down, alpha 1.

    The host scales by alpha / rank, so with alpha = 1 ``rank * scale`` (our alpha) is folded into lora_up. alpha is 1
    here because the host's "existing LoRA" input takes alpha to be 1 whatever the file says.
    """
    host: dict[str, Tensor] = {}
    for name, down, up in _pairs(state):
        host[f"{PREFIX}{name}.lora_down.weight"] = down.clone()
        host[f"{PREFIX}{name}.lora_up.weight"] = up * (scale * len(down))
        host[f"{PREFIX}{name}.alpha"] = torch.tensor(1.0)
    return host


def to_file_tensors(
    state: Mapping[str, Tensor],
    scale: float,
    file_format: LoraFileFormat,
    in_diffusers: Mapping[str, Sequence[LayerPart]] | None = None,
) -> dict[str, Tensor]:
    """Return peft tensors as they are written to a file.

    "diffusers" ("transformer.<diffusers' layer>.lora_A/B.weight") and "peft" ("diffusion_model.<layer>.lora_A/B.weight")
    carry no alpha, so the scale is folded into B. "kohya" is "lora_unet_<layer with underscores>.lora_down/up.weight"
    and ".alpha".

    Args:
        state: "<layer>.lora_A.weight" (r, in) and "<layer>.lora_B.weight" (out, r).
        scale: alpha / r, the same for all layers.
        file_format: Which naming scheme to use.
        in_diffusers: Layer -> its parts under diffusers' names; without it "diffusers" is written as "peft".
    """
    tensors: dict[str, Tensor] = {}
    for name, down, up in _pairs(state):
        if file_format == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = down.clone()
            tensors[f"{stem}.lora_up.weight"] = up.clone()
            tensors[f"{stem}.alpha"] = torch.tensor(scale * len(down))
        elif file_format == "diffusers" and in_diffusers:
            for part in in_diffusers[name]:
                rows = up[part.first_row : part.first_row + part.num_rows]
                tensors[f"transformer.{part.name}.lora_A.weight"] = down.clone()
                tensors[f"transformer.{part.name}.lora_B.weight"] = rows * scale
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = down.clone()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = up * scale
    return tensors


def _pairs(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            yield name, down, state[f"{name}.lora_B.weight"]

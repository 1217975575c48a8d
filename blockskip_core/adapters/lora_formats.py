"""LoRA tensors as the host and as files want them, and the metadata in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

PREFIX = "diffusion_model."
LoraFileFormat = Literal["peft", "kohya"]


def to_host_lora(state: Mapping[str, Tensor], scale: float, rank: int) -> dict[str, Tensor]:
    """Return peft tensors in the form of ComfyUI's own trainer: lora_up, lora_down, alpha 1.

    The host scales by alpha / rank, so alpha = 1 leaves ``rank * scale`` (our alpha) to be folded into lora_up. Its
    "existing LoRA" input reads alpha as 1 whatever the file says, which is why alpha is 1 here.
    """
    host: dict[str, Tensor] = {}
    for name, down, up in _pairs(state):
        host[f"{PREFIX}{name}.lora_down.weight"] = down.clone()
        host[f"{PREFIX}{name}.lora_up.weight"] = up * (scale * rank)
        host[f"{PREFIX}{name}.alpha"] = torch.tensor(1.0)
    return host


def to_file_tensors(
    state: Mapping[str, Tensor], scale: float, rank: int, file_format: LoraFileFormat
) -> dict[str, Tensor]:
    """Return peft tensors as they are written to a file.

    "peft" ("diffusion_model.<layer>.lora_A/B.weight") carries no alpha, so the scale is folded into B. "kohya"
    ("lora_unet_<layer with underscores>.lora_down/up.weight" and ".alpha") is what diffusers reads for FLUX.1.
    """
    tensors: dict[str, Tensor] = {}
    for name, down, up in _pairs(state):
        if file_format == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = down.clone()
            tensors[f"{stem}.lora_up.weight"] = up.clone()
            tensors[f"{stem}.alpha"] = torch.tensor(scale * rank)
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = down.clone()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = up * scale
    return tensors


def _pairs(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            yield name, down, state[f"{name}.lora_B.weight"]


def metadata_to_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as safetensors wants it: strings, with all of our entries under "blockskip"."""
    return {"format": "pt", "blockskip": json.dumps(metadata, sort_keys=True)}


def metadata_from_strings(strings: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what :func:`metadata_to_strings` packed; empty for a file that is not ours."""
    try:
        content = json.loads((strings or {}).get("blockskip", "{}"))
    except (ValueError, RecursionError):  # a file can say anything
        return {}
    return content if isinstance(content, dict) else {}

"""Files of a tiny FLUX.1 in the storage formats in common use, loaded by ComfyUI's own loader."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .tiny_flux import tiny_flux

LATENT_SHAPE = (16, 6, 10)
NUM_BLOCKS = 3
_WIDTH = 128


@dataclass(frozen=True)
class StoredAs:
    """A format.

    Attributes:
        algorithm: ComfyUI's name of a quantised format, or None for plain tensors.
        quantize: Arguments of its layout.
        conf: The file's entries for each layer apart from the algorithm.
        dtype: Dtype of plain tensors.
        smoothed: Inputs of the layers are scaled channel by channel (``pre_quant_scale``).
        rounds_inputs: ComfyUI computes with quantised inputs, even if the weights do not show it.
    """

    algorithm: str | None = None
    quantize: dict[str, Any] = field(default_factory=dict)
    conf: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    smoothed: bool = False
    rounds_inputs: bool = False


FORMATS = {
    "fp32": StoredAs(dtype=torch.float32),
    "bf16": StoredAs(dtype=torch.bfloat16),
    "fp16": StoredAs(dtype=torch.float16),
    "fp8 cast": StoredAs(dtype=torch.float8_e4m3fn),
    "fp8 scaled": StoredAs("float8_e4m3fn", {"scale": "recalculate"}),
    "mxfp8": StoredAs("mxfp8"),
    "int8": StoredAs("int8_tensorwise", rounds_inputs=True),
    "int8 convrot": StoredAs(
        "int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64}, rounds_inputs=True,
    ),
    "nvfp4": StoredAs("nvfp4"),
    "nvfp4 smoothed": StoredAs("nvfp4", smoothed=True),
    "convrot w4a4": StoredAs(
        "convrot_w4a4", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}, rounds_inputs=True
    ),
    "w4a8": StoredAs(  # in ComfyUI from 0.31 on
        "asym_w4a8_int8", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}, rounds_inputs=True
    ),
}  # fmt: skip


def plain_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in float32, by name in the file."""
    model = tiny_flux(
        depth=1, depth_single=2, width=_WIDTH, heads=1, channels=16, mlp_ratio=4.0, seed=seed
    ).model.diffusion_model  # fmt: skip
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(
    path: Any, stored: StoredAs, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a file in a format; a quantised format applies to the linear layers of the blocks."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if stored.algorithm is None:
        plain = {name: tensor.to(stored.dtype).contiguous() for name, tensor in tensors.items()}
        save_file(plain, path, metadata=metadata)
        return
    written, layers = {}, {}
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        if "_blocks." not in name or not name.endswith(".weight") or tensor.dim() != 2:
            written[name] = tensor.clone()
            continue
        layout = QUANT_ALGOS[stored.algorithm]["comfy_tensor_layout"]
        weight = QuantizedTensor.from_float(tensor, layout, **stored.quantize)
        written.update({key: part.clone() for key, part in weight.state_dict(name).items()})
        layer = name.removesuffix(".weight")
        if stored.smoothed:
            written[f"{layer}.pre_quant_scale"] = 0.5 + torch.rand(tensor.shape[1], generator=generator)
        layers[layer] = {"format": stored.algorithm, **stored.conf}
    save_file(written, path, metadata={**(metadata or {}), "_quantization_metadata": json.dumps({"layers": layers})})


def load(path: Any, stored: StoredAs) -> Any:
    """Load a file as ComfyUI's Load Diffusion Model does."""
    import comfy.sd

    options = {} if stored.dtype is None else {"dtype": stored.dtype}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options=options)


def known_format(name: str) -> StoredAs:
    """The format of this name; the test is skipped if the host does not have it."""
    from comfy.quant_ops import QUANT_ALGOS

    stored = FORMATS[name]
    known = QUANT_ALGOS.get(stored.algorithm)
    if stored.algorithm and (known is None or (stored.smoothed and "pre_quant_scale" not in known["parameters"])):
        pytest.skip("this ComfyUI does not have the format")
    return stored


def stored_flux(folder: Any, name: str, seed: int = 0) -> Any:
    """A MODEL that was stored in a format."""
    known_format(name)
    path = folder / "model.safetensors"
    write(path, FORMATS[name], plain_tensors(seed))
    return load(path, FORMATS[name])

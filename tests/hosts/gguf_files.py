"""GGUF files of tiny models, read by the real ComfyUI-GGUF, which is not part of this repository.

Its folder is named by BLOCKSKIP_COMFYUI_GGUF; without it, or without the package ``gguf``, the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from .tiny_families import TinyFamily

PACK = "comfyui_gguf_for_tests"
GROUP = 32  # numbers that share a scale


def pack_or_skip() -> ModuleType:
    """ComfyUI-GGUF, imported as ComfyUI does."""
    folder = os.environ.get("BLOCKSKIP_COMFYUI_GGUF")
    if not folder:
        pytest.skip("BLOCKSKIP_COMFYUI_GGUF does not name a folder with ComfyUI-GGUF")
    pytest.importorskip("gguf")
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, Path(folder) / "__init__.py", submodule_search_locations=[folder]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    return sys.modules[PACK]


def write(path: Path, model: nn.Module) -> None:
    """Write a file: weights of linear layers in three quantised types by turns, everything else in float32."""
    import gguf

    types = cycle(gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q5_1"))
    writer = gguf.GGUFWriter(path, "flux")  # the loader knows twelve names, and uses this one for nothing else
    packed = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, tensor in model.state_dict().items():
        numbers = tensor.float().numpy()
        if name not in packed or tensor.shape[1] % GROUP:
            writer.add_tensor(name, numbers)
            continue
        kind = next(types)
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(tiny: TinyFamily, path: Path) -> Any:
    """The tiny model of a family as a MODEL from a file, with the pack's layers and patcher.

    The file does not show ComfyUI which class so small a model is of, so the class is given.
    """
    pack = pack_or_skip()
    write(path, tiny.build().model.diffusion_model)
    with torch.inference_mode():  # as ComfyUI's loaders do
        state = pack.nodes.gguf_sd_loader(str(path))
        patcher = tiny.build(operations=pack.nodes.GGMLOps())
        patcher.model.load_model_weights(state)
    return pack.nodes.GGUFModelPatcher.clone(patcher)


def plain_weights(patcher: Any) -> dict[str, torch.Tensor]:
    """Every weight in float32, unpacked by the pack's own function."""
    unpack = sys.modules[f"{PACK}.dequant"].dequantize_tensor
    parameters = patcher.model.diffusion_model.named_parameters()
    return {name: unpack(parameter, torch.float32).as_subclass(torch.Tensor).clone() for name, parameter in parameters}

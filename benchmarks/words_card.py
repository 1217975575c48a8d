"""Train Word on models of full size on an emulated card, through the node and ComfyUI's own memory management.

Part of the benchmark ``words``; run in a separate process for each cell. The card's tensors have shapes but no data
(``devtools/card/shapes.py``): nothing is computed, but everything is moved, kept and freed as on a real card. Takes the cell
as JSON and prints the measurements as one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import command_line
import torch

STEPS = 2


@dataclass(frozen=True)
class WordCell:
    """What to run.

    Attributes:
        model: A name of ``words_memory.SUBJECTS``.
        side: Of the pictures, in pixels.
        directions: Words of a step.
        residency: As on the node.
        card: GiB of the card.
        weights: "fp16" or "fp8" as published, or the format of the model's linear layers: "int8" or "4-bit", which run in
            ComfyUI's plain operations, whose intermediate results are in int32 and float32. In int8 the text encoders' are too.
        fused: Whether int8 layers take the memory of fused kernels instead, which keep no intermediate results.
    """

    model: str
    side: int
    directions: int
    residency: str
    card: float
    weights: str
    fused: bool = False


CELLS = (
    WordCell("SD1.5", 512, 3, "together", 4.0, "fp16"),
    WordCell("SD1.5", 512, 3, "together", 4.0, "int8"),
    WordCell("SDXL", 1024, 3, "together", 6.0, "int8"),
    WordCell("SDXL", 1024, 8, "in turns", 6.0, "int8"),
    WordCell("SDXL", 1024, 8, "in turns", 6.0, "int8", fused=True),
    WordCell("SDXL", 1024, 8, "in turns", 4.66, "int8"),  # 5 GB
    WordCell("FLUX.1-dev", 512, 8, "in turns", 16.0, "fp8"),
    WordCell("FLUX.1-dev", 1024, 3, "in turns", 12.09, "fp8"),  # its own weights and 1 GiB
    WordCell("FLUX.1-dev", 512, 8, "in turns", 12.0, "4-bit"),
    WordCell("FLUX.1-dev", 512, 8, "in turns", 8.0, "4-bit"),
)


def seen_in(cell: WordCell, folder: Path, comfyui: Path) -> dict[str, Any]:
    """Run a cell and return the measurements in bytes; ComfyUI must not have been imported before."""
    from card_runs import Cell, NoVae, Peaks, installed_card

    card = installed_card(Cell(cell.model, "", cell.card), comfyui)
    import folder_paths
    from blockskip_pack import nodes
    from words_memory import layout_of

    folder_paths.output_directory = folder_paths.temp_directory = str(folder)
    folder_paths.folder_names_and_paths["embeddings"] = ([str(folder)], {".safetensors"})
    model, clip = on_the_card(cell.model, cell.weights)
    layout = layout_of(clip)  # the card has no numbers to look up
    nodes.words.prepare.known_word = lambda clip, word: (list(layout.parts), layout.split(torch.ones(layout.numbers)))
    if cell.fused:
        fuse_int8()
    peaks, calls = Peaks(card.memory, 0, 0), rows_of(model)
    report = run(nodes.TrainWord, {
        "model": model, "clip": clip, "vae": NoVae(model.model), "images": torch.rand(1, cell.side, cell.side, 3),
        "captions": "a photo of {word} on the grass", "like_word": "dog", "name": "word", "steps": STEPS, "seed": 0,
        "resolution": cell.side, "directions": cell.directions, "check_perturbation": False, "residency": cell.residency,
        "resume": False,
    })[4]  # fmt: skip
    (told,) = [line for line in report.splitlines() if line.startswith("Counted")]
    return {**asdict(cell), "peak": max(peaks.bytes.values()), "rows_of_calls": sorted(calls), "told": told}


def on_the_card(name: str, weights: str) -> tuple[Any, Any]:
    """Return MODEL and CLIP whose weights are zeros without memory, to be loaded to the card."""
    import comfy.model_management
    import comfy.model_patcher
    import words_memory
    from comfy.quant_ops import QuantizedTensor

    from devtools.card.shapes import zero

    device = comfy.model_management.get_torch_device()
    words_memory.WHERE = words_memory.CPU
    with torch.inference_mode():  # as the host loads
        made = words_memory.model_of(name).model
        clip = words_memory.clip_of(name, torch.float8_e4m3fn)
        if weights in ("int8", "4-bit"):
            pack(made, weights)
        if weights == "int8":
            pack(clip.cond_stage_model, weights)
        for module in (made, clip.cond_stage_model):
            for tensor in (*module.parameters(), *module.buffers()):
                if not isinstance(tensor, QuantizedTensor):
                    zero(tensor)
    clip.patcher.load_device = device
    return comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=words_memory.CPU), clip


def pack(module: torch.nn.Module, weight_format: str) -> None:
    """Put a module's linear layers into a format, as the host's files in that format have them, without numbers."""
    import comfy.ops
    from blockskip_pack.blockskip_core.accounting.weight_formats import WEIGHT_FORMATS
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    packed = WEIGHT_FORMATS[weight_format]
    linear_class = comfy.ops.mixed_precision_ops({}, torch.float16, full_precision_mm=True).Linear
    layout = QUANT_ALGOS[packed.algorithm]["comfy_tensor_layout"]
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            linear = linear_class(layer.in_features, layer.out_features, bias=False)
            linear.quant_format, linear.layout_type = packed.algorithm, layout
            shape = torch.empty(layer.weight.shape, dtype=torch.float16, device="meta")
            weight = without_numbers(QuantizedTensor.from_float(shape, layout, **packed.options))
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            linear._parameters["bias"] = layer.bias
            module.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = linear


def without_numbers(weight: Any) -> Any:
    """Return a weight on the CPU, not written and so without memory, from a quantised one on torch's ``meta`` device."""
    names, about = weight.__tensor_flatten__()
    parts = {name: torch.empty_like(getattr(weight, name), device="cpu") for name in names}
    return type(weight).__tensor_unflatten__(parts, about, weight.shape, weight.stride())


def fuse_int8() -> None:
    """Let int8 layers take the memory that they take in fused kernels: inputs in int8, and the result, without numbers."""
    from comfy_kitchen.backends import eager

    def fused(*, x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype, **more: Any) -> torch.Tensor:
        packed = torch.empty_like(x, dtype=torch.int8)
        return packed.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)

    eager.int8_linear = fused


def rows_of(model: Any) -> set[int]:
    """Return a set to which the numbers of rows of the model's calls are added."""
    seen: set[int] = set()
    model.model.diffusion_model.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    return seen


def run(node: Any, inputs: dict[str, Any]) -> Any:
    """Run a node as the host does, and return its outputs."""
    from comfy_api.latest import io

    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    with torch.inference_mode():
        return clone.EXECUTE_NORMALIZED(**{name: [value] for name, value in inputs.items()}).args


def rows(comfyui: Path, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Run the cells of which there is no row yet, each in a process of its own."""
    for cell in CELLS:
        if not any(asdict(cell).items() <= row.items() for row in done if row.get("group") == "card"):
            yield command_line.row_of_process(Path(__file__), cell, comfyui)


def main() -> None:
    """Run the cell given on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        row = seen_in(WordCell(**json.loads(sys.argv[1])), Path(folder), Path(os.environ["COMFYUI_PATH"]))
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

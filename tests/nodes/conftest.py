"""The pack's nodes, called as ComfyUI calls them, on a tiny FLUX.1, with files in a temporary folder."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MANUAL = {"method": "manual", "skip_ratio": 0.5, "front": 2, "back": 1}
PATCHES = {
    "draws": 6, "patch_min": 32, "patch_max": 64, "storage": "disk", "seed": 3, "back_residual": "constant"
}  # fmt: skip
TRAINING = {"steps": 3, "learning_rate": 1e-2, "rank": 4, "seed": 5, "resume": False}


class Listed(list):
    """The value of a list output, for example one element per picture. Anything else is one value."""


@pytest.fixture(scope="session")
def nodes(comfyui: Path) -> ModuleType:
    """The pack's node package, in the pack as ComfyUI loads it."""
    return importlib.import_module("blockskip_pack.nodes")


@pytest.fixture(scope="session")
def core(nodes: ModuleType) -> Callable[[str], ModuleType]:
    """Import a module of the pack's core by name: ``core("residuals.cache")``."""
    return lambda name: importlib.import_module(f"blockskip_pack.blockskip_core.{name}")


@pytest.fixture(scope="session")
def tiny(comfyui: Path) -> ModuleType:
    """The builder of tiny models; its folder is not a package."""
    spec = importlib.util.spec_from_file_location("blockskip_tiny_flux", ROOT / "tests" / "hosts" / "tiny_flux.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tiny: ModuleType) -> Any:
    """A MODEL of 2 double and 4 single blocks."""
    return tiny.tiny_flux()


@pytest.fixture
def prompt(tiny: ModuleType) -> list:
    """One CONDITIONING."""
    return tiny.captions((5,))[0]


@pytest.fixture
def pictures() -> Listed:
    """Three pictures of different sizes, as from a dataset node."""
    generator = torch.Generator().manual_seed(11)
    sizes = [(64, 64), (70, 96), (48, 130)]
    return Listed(torch.rand(1, height, width, 3, generator=generator) for height, width in sizes)


class TinyVae:
    """A VAE with 8 pixels per cell and 4 channels: the mean of each cell, then a fixed linear map."""

    def __init__(self) -> None:
        self.first_stage_model = torch.nn.Linear(3, 4, bias=False)
        torch.nn.init.orthogonal_(self.first_stage_model.weight, generator=torch.Generator().manual_seed(7))
        self.encoded = 0

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += len(pixels)
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.einsum("oc,bchw->bohw", self.first_stage_model.weight.detach(), cells)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        cells = torch.einsum("oc,bohw->bchw", self.first_stage_model.weight.detach(), latent)
        return torch.nn.functional.interpolate(cells, scale_factor=8).movedim(1, -1).clamp(0.0, 1.0)


@pytest.fixture
def vae() -> TinyVae:
    """A VAE for the tiny model."""
    return TinyVae()


@pytest.fixture
def folders(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """ComfyUI's output and temp folders, empty and only for the test; output/loras is a loras folder, as in main.py."""
    import folder_paths

    found = SimpleNamespace(output=tmp_path / "output", temp=tmp_path / "temp", loras=tmp_path / "output" / "loras")
    found.loras.mkdir(parents=True)
    found.temp.mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(found.output))
    monkeypatch.setattr(folder_paths, "temp_directory", str(found.temp))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(found.loras)], {".safetensors", ".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    found.files = lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    return found


@pytest.fixture(scope="session")
def run_node(comfyui: Path) -> Callable[..., Any]:
    """Call a node class: ``run_node(SelectBlocks, model=model, ...)`` gives its NodeOutput.

    As in ComfyUI: in inference mode, in a locked clone of the class, and for a node that takes lists with every input,
    including widgets, in a list.
    """
    from comfy_api.latest import io

    def run(node: type, **inputs: Any) -> Any:
        if node.INPUT_IS_LIST:
            inputs = {name: value if isinstance(value, Listed) else [value] for name, value in inputs.items()}
        hidden = {io.Hidden.unique_id: "1", io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: None}
        clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
        with torch.inference_mode():
            return clone.EXECUTE_NORMALIZED(**inputs)

    return run


@pytest.fixture
def bench(nodes, model, vae, prompt, pictures, folders, run_node) -> SimpleNamespace:
    """The four nodes connected; every call takes the inputs that differ from the defaults."""

    def select(**changes: Any) -> Any:
        return run_node(nodes.SelectBlocks, **{"model": model, "positive": prompt, **MANUAL, **changes})

    def precompute(**changes: Any) -> Any:
        ordinary = {"model": model, "vae": vae, "images": pictures, "positive": prompt, **PATCHES}
        if "selection" not in changes:
            changes["selection"] = select()[0]
        return run_node(nodes.PrecomputeResiduals, **{**ordinary, **changes})

    def train(**changes: Any) -> Any:
        if "residuals" not in changes:
            changes["residuals"] = precompute()[0]
        return run_node(nodes.TrainLora, **{"model": model, **TRAINING, **changes})

    def apply(**changes: Any) -> Any:
        return run_node(nodes.ApplyLora, **{"model": model, "strength_model": 1.0, **changes})

    return SimpleNamespace(
        select=select, precompute=precompute, train=train, apply=apply, model=model, vae=vae, prompt=prompt,
        pictures=pictures, folders=folders,
    )  # fmt: skip

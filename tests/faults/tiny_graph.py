"""Precompute Residuals and Dynamic Patch Trainer on the tests' tiny FLUX, in a process without pytest."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = "blockskip_tests"
LEFTOVERS = (".part", ".trial", ".lock")
PATCHES = {
    "draws": 6,
    "patch_min": 32,
    "patch_max": 64,
    "storage": "disk",
    "seed": 3,
    "chunk_size": 2,
    "back_residual": "constant",
}
TRAINING = {
    "steps": 5,
    "learning_rate": 1e-2,
    "rank": 16,
    "seed": 5,
    "save_every": 1,
    "keep_last": 2,
    "output_name": "loras/toy",
}


def load(*path: str) -> ModuleType:
    """Load a module of the tests from its file, in a package, so that it can import its neighbours."""
    if PACKAGE not in sys.modules:
        sys.modules[PACKAGE] = ModuleType(PACKAGE)
        sys.modules[PACKAGE].__path__ = [str(TESTS)]
    return importlib.import_module(".".join([PACKAGE, *path]).removesuffix(".py"))


def prepare() -> None:
    """Import ComfyUI, on the CPU, and the pack, including its lazy imports."""
    load("conftest.py")  # puts ComfyUI first on the path, and loads the pack
    from comfy.cli_args import args

    args.cpu = True
    importlib.import_module("blockskip_pack.nodes")
    for late in ("peft", "diffusers.optimization", "diffusers.training_utils"):
        importlib.import_module(late)
    torch.set_num_threads(1)


def pack(name: str) -> ModuleType:
    """A module of the pack."""
    return importlib.import_module(f"blockskip_pack.{name}")


def pictures() -> list[torch.Tensor]:
    """Three pictures of different sizes."""
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(1, *size, 3, generator=generator) for size in ((64, 64), (70, 96), (48, 130))]


def use_folders(base: Path) -> None:
    """Make ComfyUI keep its files below ``base``, like its option --base-directory."""
    import folder_paths

    (base / "output" / "loras").mkdir(parents=True, exist_ok=True)
    (base / "temp").mkdir(exist_ok=True)
    folder_paths.output_directory, folder_paths.temp_directory = str(base / "output"), str(base / "temp")
    folder_paths.folder_names_and_paths["loras"] = ([str(base / "output" / "loras")], {".safetensors"})
    folder_paths.filename_list_cache.clear()


def call(node: type, **inputs: Any) -> Any:
    """Call a node that takes lists as ComfyUI does."""
    from comfy_api.latest import io

    hidden = {io.Hidden.unique_id: "1", io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: None}
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden}).EXECUTE_NORMALIZED(
            **{name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        )


def run(**changes: Any) -> Any:
    """Run the graph and return the trainer's output. ``changes`` are settings of either node or ``precompute_seed``."""
    ours, tiny = pack("nodes"), load("hosts", "tiny_flux.py")
    model, (prompt,) = tiny.tiny_flux(), tiny.captions((5,))
    patches = {name: changes.pop(name, value) for name, value in PATCHES.items() if name != "seed"}
    patches["seed"] = changes.pop("precompute_seed", PATCHES["seed"])
    selection = call(
        ours.SelectBlocks, model=model, positive=[prompt], method="manual", skip_ratio=0.5, front=2, back=1
    )[0]
    vae = load("nodes", "conftest.py").TinyVae()
    residuals = call(
        ours.PrecomputeResiduals, model=model, vae=vae, images=pictures(), positive=[prompt], selection=selection,
        **patches,
    )[0]  # fmt: skip
    return call(ours.TrainLora, model=model, residuals=residuals, **{**TRAINING, **changes})


def damaged(base: Path) -> list[str]:
    """The files below a folder that have their final name but are incomplete."""
    found = []
    for path in sorted(base.rglob("*")):
        try:
            # Twice, because safetensors opens a file by its name more than once, and a run may replace it in between.
            if path.is_file() and not _is_whole(path) and path.is_file() and not _is_whole(path):
                found.append(str(path.relative_to(base)))
        except FileNotFoundError:  # a running process has removed or renamed it
            continue
    return found


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return all(file.get_tensor(name) is not None for name in file.keys())
        except FileNotFoundError:
            raise
        except Exception:  # noqa: BLE001  whatever it is, the file is not whole
            return False
    text = path.read_bytes()
    if path.suffix == ".json":
        outer = json.loads(text or "{}")
        return (
            "body" in outer and hashlib.blake2b(outer["body"].encode(), digest_size=16).hexdigest() == outer["digest"]
        )
    return not path.name.endswith(".html") or text.rstrip().endswith(b"</html>")


def leftovers(base: Path) -> list[str]:
    """Temporary files below a folder."""
    return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.suffix in LEFTOVERS)


def digests(base: Path) -> dict[str, str]:
    """Every file below a folder, with a digest of its content."""
    files = [path for path in sorted(base.rglob("*")) if path.is_file()]
    return {str(path.relative_to(base)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}

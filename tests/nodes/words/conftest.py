"""Train Word on a tiny FLUX.1 with small text encoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SETTINGS = {
    "captions": "a photo of {word} on grass", "like_word": "dog", "name": "my_dog", "steps": 4, "seed": 3, "resolution": 64,
    "directions": 3, "check_perturbation": False,
}  # fmt: skip


def _from_hosts(name: str) -> ModuleType:
    """A helper of the tests of hosts; their folder is not a package."""
    path = Path(__file__).resolve().parents[2] / "hosts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"blockskip_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small(comfyui: Path) -> ModuleType:
    """The builder of small CLIPs."""
    return _from_hosts("small_clips")


@pytest.fixture
def encoder(comfyui: Path) -> Any:
    """A small vision encoder, to compare samples with."""
    return _from_hosts("vision_encoders").QuadrantEncoder()


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings folder, in which the CLIP looks; emptied before each test."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture
def words(nodes, model, vae, pictures, folders, run_node, small, embeddings, monkeypatch) -> SimpleNamespace:
    """The node with everything connected; every call takes the inputs that differ from these."""
    import folder_paths

    for path in sorted(embeddings.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "embeddings", ([str(embeddings)], {".safetensors"}))
    clip = small.small_clip("FLUX.1", str(embeddings))
    ordinary = {"model": model, "clip": clip, "vae": vae, "images": pictures, **SETTINGS}

    def train(**changes: Any) -> Any:
        return run_node(nodes.TrainWord, **{**ordinary, **changes})

    def files() -> list[str]:
        return sorted(path.relative_to(embeddings).as_posix() for path in embeddings.rglob("*") if path.is_file())

    return SimpleNamespace(train=train, files=files, clip=clip, model=model, folder=embeddings, folders=folders)

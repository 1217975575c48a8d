"""Small CLIPs and MODELs, and an empty embeddings folder."""

from __future__ import annotations

from typing import Any

import pytest

from ..small_clips import small_clip, small_sdxl, small_unet
from ..tiny_flux import tiny_flux


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which the CLIPs look for embedding files; tests write files that only they use."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(autouse=True)
def _temporary_folder(comfyui: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's temporary folder is empty and only for the test."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))


@pytest.fixture
def clip_of(embeddings: Any) -> Any:
    """Make a CLIP: ``clip_of("FLUX.1")``."""
    return lambda family: small_clip(family, str(embeddings))


@pytest.fixture
def model_of(comfyui: Any) -> Any:
    """Make a MODEL that takes the conditionings of a family's CLIP."""
    makers = {"FLUX.1": tiny_flux, "SDXL": small_sdxl, "SD1.5": small_unet}
    return lambda family: makers[family]()

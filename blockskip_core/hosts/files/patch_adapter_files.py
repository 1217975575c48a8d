"""Files of trained patch adapters: one safetensors file with metadata, below ComfyUI's loras folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...ddit.trained_patches import TrainedPatches
from ...errors import PatchAdapterError
from ...files import open_tensors, write_atomically

_KEY = "blockskip_patch_adapters"


def save_patch_adapters(trained: TrainedPatches, path: Path) -> None:
    """Write a file, completely or not at all.

    Raises:
        StorageError: If the disk cannot be written.
    """
    metadata = {"format": "pt", _KEY: json.dumps(trained.description(), sort_keys=True)}
    tensors = trained.tensors()
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def require_patch_adapters(name: str) -> Path:
    """Return the file of a name in the loras folders.

    Raises:
        PatchAdapterError: If there is none.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None or name not in folder_paths.get_filename_list("loras"):
        raise PatchAdapterError(f"There is no {name!r} in ComfyUI's loras folders. Refresh the list and choose again.")
    return Path(path)


def load_patch_adapters(name: str) -> TrainedPatches:
    """Read a file from the loras folders.

    Raises:
        PatchAdapterError: If it is missing, damaged, or holds something else.
    """
    path = require_patch_adapters(name)
    try:
        with open_tensors(path) as file:
            about = _description(name, file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise PatchAdapterError(f"{name} cannot be read. It may be damaged or still downloading.") from error
    return TrainedPatches.read(tensors, about)


def _description(name: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        about = json.loads((metadata or {})[_KEY])
    except (KeyError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise PatchAdapterError(
            f"{name} holds no patch adapters. Choose a file that Train Patch Adapters (DDiT) has saved."
        )
    return about

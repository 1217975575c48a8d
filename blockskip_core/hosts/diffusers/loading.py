"""A pipeline from a folder on this machine: safetensors only, none of the folder's code, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidInputError, UnsupportedModelError
from .experts import Component
from .families import FAMILIES, family_of_pipeline

INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_ADAPTER = "adapter_config.json"
_WITH_WEIGHTS = ("transformer", "text_encoder", "vae")  # how the names of such components begin


def load_pipeline(folder: Path | str, *, dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline in the form in which ``save_pretrained`` writes it, into host memory.

    Args:
        folder: The pipeline's folder, with its ``model_index.json``.
        dtype: Dtype of the weights; by default as stored.

    Raises:
        InvalidInputError: If there is no pipeline, or a component's weights are not safetensors files in its folder.
        UnsupportedModelError: If it is not a pipeline of a supported family, or needs code that is not diffusers' or
            transformers', or a component has an adapter.
    """
    folder = Path(folder)
    index = _read_index(folder)
    for name, described in index.items():
        if not name.startswith("_") and isinstance(described, list) and described[0] is not None:
            _require_safe(folder, name, described[0])
    import diffusers  # slow to import: only when a pipeline is loaded

    return getattr(diffusers, index["_class_name"]).from_pretrained(folder, **_settings(dtype))


def load_transformer(
    folder: Path | str, *, dtype: torch.dtype | None = None, component: Component = "transformer"
) -> Any:
    """Load a pipeline's transformer alone, which is all that a training needs if texts and latents are there.

    Args:
        folder: The pipeline's folder.
        dtype: Dtype of the weights; by default as stored.
        component: Which, if it has two.

    Raises:
        InvalidInputError, UnsupportedModelError: As :func:`load_pipeline`.
    """
    folder = Path(folder)
    described = _read_index(folder).get(component)
    library, name = described if isinstance(described, list) and len(described) == 2 else (None, None)
    _require_safe(folder, component, library)
    import diffusers

    known = [family.model_class for family in FAMILIES]
    if name not in known:
        raise UnsupportedModelError(
            f"Expected a transformer of one of diffusers' classes {', '.join(known)}, got {name}."
        )
    return getattr(diffusers, name).from_pretrained(folder, subfolder=component, **_settings(dtype))


def _settings(dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the arguments with which everything is loaded; without a dtype it is the stored one."""
    safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    return {**safe, **({} if dtype is None else {"dtype": dtype})}


def _require_safe(folder: Path, name: str, library: Any) -> None:
    """Check that a component is of a class of diffusers or transformers, and its weights are safetensors."""
    if library not in _LIBRARIES:
        raise UnsupportedModelError(
            f"{name} of {folder} needs code from {library}, and only classes of diffusers and transformers are loaded. Use a "
            "folder without code of its own."
        )
    if name.startswith(_WITH_WEIGHTS) and not any((folder / name).glob("*.safetensors")):
        raise InvalidInputError(
            f"{folder / name} has no safetensors file, and other formats can carry code and are not read. Save the model as "
            "safetensors."
        )
    for index in sorted((folder / name).glob("*.safetensors.index.json")):
        _require_safe_parts(index)
    if (folder / name / _ADAPTER).exists():  # transformers would load it too, and what it names as its base
        raise UnsupportedModelError(
            f"{folder / name} has an adapter ({_ADAPTER}), which may name files elsewhere. Merge it into the model, and save "
            "that."
        )


def _require_safe_parts(index: Path) -> None:
    """Check that the parts of a model in several files are safetensors files beside their index."""
    content = _read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    names = list(parts.values()) if isinstance(parts, dict) else [None]
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\:"):
            raise InvalidInputError(
                f"{index} must name safetensors files beside it, got {name!r}; other formats can carry code and are not read. "
                "Save the model as safetensors."
            )


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a pipeline of a known family."""
    content = _read_json(folder / INDEX)
    index: dict[str, Any] = content if isinstance(content, dict) else {}
    family_of_pipeline(index.get("_class_name"))
    return index


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path} cannot be read ({error}). Give the folder of a pipeline as diffusers saves it."
        ) from error

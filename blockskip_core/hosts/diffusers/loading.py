"""A pipeline from a folder on this machine: safetensors only, none of the folder's code, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidInputError, UnsupportedModelError
from .families import family_of_pipeline

INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_WITH_WEIGHTS = ("transformer", "text_encoder", "vae")  # how the names of such components begin


def load_pipeline(folder: Path | str, *, dtype: torch.dtype | None = None) -> Any:
    """Load a pipeline in the form in which ``save_pretrained`` writes it, into host memory.

    Args:
        folder: The pipeline's folder, with its ``model_index.json``.
        dtype: Dtype of the weights; by default as stored.

    Raises:
        InvalidInputError: If there is no pipeline, or a component has no safetensors file.
        UnsupportedModelError: If it is not a pipeline of a supported family, or needs code that is not diffusers' or
            transformers'.
    """
    folder = Path(folder)
    index = _read_index(folder)
    family_of_pipeline(index.get("_class_name"))
    for name, described in index.items():
        if name.startswith("_") or not isinstance(described, list) or described[0] is None:
            continue
        if described[0] not in _LIBRARIES:
            raise UnsupportedModelError(
                f"{name} of {folder} needs code from {described[0]}, and only classes of diffusers and transformers are "
                "loaded. Use a folder without code of its own."
            )
        if name.startswith(_WITH_WEIGHTS) and not any((folder / name).glob("*.safetensors")):
            raise InvalidInputError(
                f"{folder / name} has no safetensors file, and other formats can carry code and are not read. Save the model "
                "as safetensors."
            )
    import diffusers  # slow to import: only when a pipeline is loaded

    settings = {} if dtype is None else {"dtype": dtype}
    return getattr(diffusers, index["_class_name"]).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **settings
    )


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{folder / INDEX} cannot be read ({error}). Give the folder of a pipeline as diffusers saves it."
        ) from error
    return index if isinstance(index, dict) else {}

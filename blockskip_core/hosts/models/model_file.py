"""The file that a MODEL was loaded from: found on the MODEL, written down, loaded again.

ComfyUI's own loaders leave on a MODEL how to load it again (``cached_patcher_init``: function and arguments). Only these
loaders are used, only with the options that ComfyUI's own nodes set, and only for safetensors files. Other packs'
loaders leave nothing, and a MODEL with patches is more than its file; both are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import comfy.sd
import folder_paths
import torch

from ...errors import InvalidInputError
from .patches import for_training

Loader = Literal["diffusion model", "checkpoint"]
_FOLDERS: Mapping[Loader, str] = {"diffusion model": "diffusion_models", "checkpoint": "checkpoints"}
_LOADERS: Mapping[str, Loader] = {
    "load_diffusion_model": "diffusion model",
    "load_checkpoint_guess_config": "checkpoint",
    "load_checkpoint_guess_config_model_only": "checkpoint",
}
_SAFE = (".safetensors", ".sft")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """How a MODEL is loaded.

    Attributes:
        loader: Which of ComfyUI's loaders.
        file: Name of the file, relative to a folder of models, with "/" between folders.
        dtype: Dtype of the weights that the loader was told, e.g. "float8_e4m3fn"; empty for its own choice.
        fp8_optimizations: Whether the loader was told to compute in fp8 too.
    """

    loader: Loader
    file: str
    dtype: str = ""
    fp8_optimizations: bool = False
    folder: str = field(default="", compare=False)

    def arguments(self) -> dict[str, Any]:
        """Return the file as JSON, without the folder, which every machine has elsewhere."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def load(self, path: Path) -> Any:
        """Return the MODEL that ComfyUI's loader makes of the file, which may be in another place now.

        Raises:
            InvalidInputError: If the file is of another kind, cannot be read, or holds no model that ComfyUI knows.
        """
        _require_safe(path)
        options = self._options()
        try:
            with torch.inference_mode():  # as in a node
                if self.loader == "diffusion model":
                    return comfy.sd.load_diffusion_model(str(path), model_options=options)
                loaded = comfy.sd.load_checkpoint_guess_config(
                    str(path), output_vae=False, output_clip=False, model_options=options
                )
                return loaded[0]
        except Exception as error:
            raise InvalidInputError(
                f"ComfyUI cannot load the model {path.name} ({type(error).__name__}: {error}). Copy the file again, or use "
                "the ComfyUI that the run file was written with."
            ) from error

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"fp8_optimizations": True} if self.fp8_optimizations else {}
        if self.dtype:
            dtype = getattr(torch, self.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise InvalidInputError(f"dtype of the model must be a torch dtype, got {self.dtype!r}.")
            options["dtype"] = dtype
        return options


def model_file_of(model: Any) -> ModelFile:
    """Return how to load a MODEL again.

    Raises:
        InvalidInputError: If that is not known, or the MODEL is more than what the loader makes of its file.
        UnsupportedModelError: If it has a change that training cannot follow.
    """
    patcher = for_training(model)
    _require_as_loaded(patcher)
    known: tuple[Callable[..., Any], tuple, Any] = getattr(patcher, "cached_patcher_init", None) or (None, (), None)  # type: ignore[assignment]
    function, given = known[0], known[1]
    loader = _LOADERS.get(getattr(function, "__name__", "")) if _is_the_hosts(function) else None
    if loader is None:
        raise InvalidInputError(
            "It is not known from which file the MODEL was loaded. Load it with ComfyUI's own Load Diffusion Model or "
            "Load Checkpoint."
        )
    arguments = inspect.signature(function).bind(*given).arguments
    path = Path(next(iter(arguments.values())))
    _require_safe(path)
    folder, name = _placed(path, _FOLDERS[loader])
    options = dict(arguments.get("model_options") or {})
    dtype, fast = options.pop("dtype", None), options.pop("fp8_optimizations", False)
    if options:
        raise InvalidInputError(
            f"The MODEL was loaded with {', '.join(sorted(options))}, which a run file cannot keep. Load it with ComfyUI's "
            "own Load Diffusion Model."
        )
    return ModelFile(
        loader=loader, file=name, dtype=str(dtype or "").removeprefix("torch."), fp8_optimizations=bool(fast), folder=folder
    )  # fmt: skip


def _is_the_hosts(function: Any) -> bool:
    return getattr(function, "__module__", "") == comfy.sd.__name__


def _require_as_loaded(patcher: Any) -> None:
    options = patcher.model_options
    changes = [*patcher.object_patches, *(["a LoRA or another weight patch"] if patcher.patches else [])]
    changes += [str(key) for key in patcher.weight_wrapper_patches]
    changes += [str(key) for key in (*options, *options.get("transformer_options", {})) if key != "transformer_options"]
    if changes:
        raise InvalidInputError(
            f"The MODEL has {', '.join(dict.fromkeys(changes))} on it, which is not in its file. Connect the MODEL as its "
            "loader gives it, here and at Precompute Residuals."
        )


def _require_safe(path: Path) -> None:
    if path.suffix.lower() not in _SAFE:
        raise InvalidInputError(
            f"{path.name} is not a safetensors file; other formats can carry code and are not read."
        )


def _placed(path: Path, kind: str) -> tuple[str, str]:
    """Return a folder of models and the file's name in it; a file elsewhere is in its own folder."""
    for folder in folder_paths.get_folder_paths(kind):
        if path.is_relative_to(folder):
            return str(folder), path.relative_to(folder).as_posix()
    return str(path.parent), path.name

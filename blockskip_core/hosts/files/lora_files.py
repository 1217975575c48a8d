"""LoRA files and LORA_MODELs of the host: written with metadata, checked before they are applied."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import comfy.lora
import comfy.lora_convert
import folder_paths
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...adapters.lora import LoraAdapters
from ...adapters.lora_formats import metadata_from_strings, metadata_to_strings
from ...errors import InvalidInputError, LoraFileError, StorageError
from ...files import open_tensors, remove_leftovers, write_atomically
from .names import name_below


class LoraModel(dict):
    """A LORA_MODEL of the host (name -> tensor) that also carries what it says of itself."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def output_path(prefix: str) -> Path:
    """Return a file that does not exist yet, below the output folder, e.g. "loras/toy" -> loras/toy_00001_.safetensors.

    Raises:
        InvalidInputError: If the prefix is no name on some system, or leads out of the output folder.
        StorageError: If its folder cannot be made.
    """
    output = Path(folder_paths.get_output_directory())
    typed = name_below(prefix, "loras/my_lora")
    _require_no_link_out(output, typed)
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(str(typed), str(output))
    except OSError as error:
        raise StorageError(f"The folder of {prefix!r} cannot be made: {error}. Choose another output_name.") from error
    return unused_path(Path(folder) / f"{name}_{max(counter, 1):05}_.safetensors")


def _require_no_link_out(output: Path, name: PurePosixPath) -> None:
    """Refuse what only looks as if it were below the output folder; ComfyUI itself does so since 0.30, without a reason."""
    inside = output.resolve()
    for folder in reversed(name.parents[:-1]):
        there = (output / folder).resolve()
        if not there.is_relative_to(inside):
            raise InvalidInputError(
                f"{output.name}/{folder} is a link to {there}, outside ComfyUI's output folder, and nothing is saved through "
                "such a link. Choose an output_name in another folder and move the file afterwards, or put the whole output "
                "folder on the other disk: start ComfyUI with --output-directory."
            )


_COUNTED = re.compile(r"(?P<name>.*)_(?P<counter>\d{5,})_\.safetensors", re.DOTALL)


def unused_path(path: Path) -> Path:
    """Return the path, or one with the next number that no file has.

    The host counts files by their names as typed, so it misses those of "loras/" and the like; and another program may
    have taken a name since.
    """
    while os.path.lexists(path):  # says no of a name that is too long, where Path.exists raises
        counted = _COUNTED.fullmatch(path.name)
        path = path.with_name(f"{counted['name']}_{int(counted['counter']) + 1:05}_.safetensors")
    return path


def require_writable(path: Path) -> None:
    """Check before a long run that a file of this name can be written at its end; remove what killed ones have left.

    Raises:
        StorageError: If the disk refuses.
    """
    name = re.escape(_COUNTED.fullmatch(path.name)["name"])
    temporary = re.compile(rf"{name}_\d{{5,}}_(step\d+(_\d+)?)?\.(safetensors|html|png)\.(part|trial)")
    remove_leftovers(path.parent, lambda name: temporary.fullmatch(name) is not None)
    trial = path.with_name(path.name + ".trial")
    try:
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as error:
        raise StorageError(f"{path.name} cannot be written: {error}. Choose another output_name.") from error


def save_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path) -> None:
    """Write a LoRA file with metadata; either the whole file is there afterwards, or none.

    Raises:
        StorageError: If the disk refuses.
    """
    strings = metadata_to_strings(metadata)
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=strings))


def file_identity(name: str | None) -> str:
    """Return a content hash of a file of the loras folders; empty if it cannot be read, or its name is not known yet."""
    if name not in folder_paths.get_filename_list("loras"):
        return ""
    try:
        path = Path(folder_paths.get_full_path_or_raise("loras", name))
        status = path.stat()
        return _content_hash(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError:  # whoever loads it says why
        return ""


@lru_cache(maxsize=64)
def _content_hash(path: Path, *stamp: int) -> str:
    """Return the hash of a file; one that was read before is read again only if its size or its times have changed."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def load_lora_file(name: str) -> LoraModel:
    """Read a file of the loras folders.

    Raises:
        LoraFileError: If it is not there or is no LoRA file.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None or name not in folder_paths.get_filename_list("loras"):
        raise LoraFileError(f"There is no {name!r} in ComfyUI's loras folders. Refresh the list and choose again.")
    if Path(path).suffix not in (".safetensors", ".sft"):
        raise LoraFileError(f"{name} is not a safetensors file; other formats can carry code and are not read.")
    try:
        with open_tensors(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            strings = file.metadata()
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{name} cannot be read as a LoRA file. It may be damaged or still downloading.") from error
    return LoraModel(tensors, metadata_from_strings(strings))


def apply_lora(patcher: Any, lora: Mapping[str, Tensor], strength: float) -> tuple[Any, int]:
    """Return (a clone of the MODEL with the LoRA patched in, number of patched layers).

    Raises:
        LoraFileError: If the LoRA holds nothing for this model, or tensors of other sizes.
    """
    patches = _patches(patcher, lora)
    if not patches:
        raise LoraFileError(
            f"This LoRA holds nothing for {type(patcher.model.diffusion_model).__name__}: it was trained for another "
            "kind of model."
        )
    # A state dict has the packed shapes of quantised weights, the parameters their own.
    _require_fitting_shapes({**patcher.model.state_dict(), **dict(patcher.model.named_parameters())}, patches)
    clone = patcher.clone()
    return clone, len(clone.add_patches(patches, strength))


def lora_to_start_from(patcher: Any, lora: Mapping[str, Tensor], adapters: LoraAdapters) -> dict[str, Tensor]:
    """Return a LoRA in any of the host's formats as peft tensors that ``adapters`` can take.

    Raises:
        LoraFileError: If it changes layers that are not trained here, has another rank, or holds nothing for the model.
    """
    patches = _patches(patcher, lora)
    if not patches:
        raise LoraFileError("The LoRA to start from holds nothing for this model: it was trained for another kind.")
    _require_fitting_shapes({**patcher.model.state_dict(), **dict(patcher.model.named_parameters())}, patches)
    state: dict[str, Tensor] = {}
    for key, patch in patches.items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight") if isinstance(key, str) else None
        if name not in adapters.names or getattr(patch, "name", "") != "lora":
            raise LoraFileError(
                f"The LoRA to start from also changes what is not trained here ({key}). Apply it to the MODEL with Load "
                "LoRA before all BlockSkip nodes, and train a new LoRA on top; or keep more blocks."
            )
        up, down, alpha, *further = patch.weights
        if any(part is not None for part in further):
            raise LoraFileError(f"The LoRA to start from is no plain LoRA: {key} has more parts, as in DoRA or LoCon.")
        if len(down) != adapters.settings.rank:
            raise LoraFileError(
                f"The LoRA to start from has rank {len(down)}, here it is {adapters.settings.rank}. Set rank to "
                f"{len(down)}."
            )
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        state[f"{name}.lora_A.weight"] = down.float()
        state[f"{name}.lora_B.weight"] = up.float() * (scale / adapters.scale)
    return state


def _patches(patcher: Any, lora: Mapping[str, Tensor]) -> dict[Any, Any]:
    """Return what the host makes of a LoRA; it takes for granted that the tensors are what their names say."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    try:
        return comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), keys, log_missing=False)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LoraFileError(f"ComfyUI cannot read this as a LoRA: {error}.") from error


def _require_fitting_shapes(weights: Mapping[str, Tensor], patches: Mapping[Any, Any]) -> None:
    for key, patch in patches.items():
        tensors = getattr(patch, "weights", None)
        name = key if isinstance(key, str) else key[0]
        if tensors is None or not isinstance(key, str) or getattr(patch, "name", "") != "lora":
            continue  # other formats, and slices of fused layers, are the host's to judge
        up, down, weight = tensors[0], tensors[1], weights[name]
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
            raise LoraFileError(
                f"This LoRA is damaged: for {name} it has matrices of the shapes {tuple(up.shape)} and "
                f"{tuple(down.shape)}, which do not fit each other."
            )
        rows, columns = up.shape[0], down.flatten(1).shape[1]
        if (rows, columns) != (weight.shape[0], math.prod(weight.shape[1:])):
            raise LoraFileError(
                f"This LoRA does not fit: for {name} it has {rows} x {columns}, the model has "
                f"{' x '.join(map(str, weight.shape))}. It was trained for a model of another size."
            )


def describe(metadata: Mapping[str, Any], lora: Mapping[str, Tensor], num_patched: int) -> str:
    """Return what a LoRA says of itself, several lines."""
    lines = [f"{num_patched} layers patched, {len(lora)} tensors."]
    if not metadata:
        return "\n".join([*lines, "The file says nothing of itself: it was not saved by BlockSkip."])
    lines.extend(f"{name.replace('_', ' ')}: {value}" for name, value in metadata.items())
    return "\n".join(lines)

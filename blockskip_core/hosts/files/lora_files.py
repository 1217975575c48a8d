"""LoRA files and LORA_MODELs of the host: written with metadata, checked before they are applied."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
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
from ...files import open_tensors, remove_leftovers, unique_token, write_atomically
from ...locks import Lock, remove_stale_locks, try_lock


class LoraModel(dict):
    """A LORA_MODEL of the host (name -> tensor) that also carries metadata."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def output_path(prefix: str) -> Path:
    """Return a file that does not exist yet, below the output folder, e.g. "loras/toy" -> loras/toy_00001_.safetensors.

    Raises:
        InvalidInputError: If the prefix is not a name or would leave the output folder.
        StorageError: If its folder cannot be made.
    """
    if not prefix.isprintable():
        raise InvalidInputError("The file name must not contain control characters. Use a plain name.")
    if os.path.basename(os.path.normpath(prefix)) in ("", ".", ".."):
        raise InvalidInputError(f"The file name {prefix!r} names no file. Use a plain name such as loras/my_lora.")
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    except OSError as error:
        raise StorageError(f"The folder of {prefix!r} cannot be made: {error}. Choose another output_name.") from error
    except Exception as error:
        raise InvalidInputError(
            f"The file name {prefix!r} must stay inside ComfyUI's output folder. Use a plain name such as loras/my_lora."
        ) from error
    return unused_path(Path(folder) / f"{name}_{max(counter, 1):05}_.safetensors")


_COUNTED = re.compile(r"(?P<name>.*)_(?P<counter>\d{5,})_\.safetensors", re.DOTALL)


def unused_path(path: Path) -> Path:
    """Return the path, or one with the next number that no file has.

    The host counts files by their names as typed, so it misses those of "loras/" and the like; and another program may
    have taken a name since.
    """
    while os.path.lexists(path):  # False for a name that is too long, where Path.exists raises
        path = _next(path)
    return path


def _next(path: Path) -> Path:
    name, counter = _parts(path)
    return path.with_name(f"{name}_{counter + 1:05}_.safetensors")


def _parts(path: Path) -> tuple[str, int]:
    """Return name and counter of a file that the host has numbered."""
    counted = _COUNTED.fullmatch(path.name)
    assert counted is not None, f"{path.name} has no number"
    return counted["name"], int(counted["counter"])


class ReservedName:
    """A file's name, and all names that begin with it, that no other run takes until it is released.

    Attributes:
        path: The file; it does not exist.

    Args:
        path: The first name to try; the next numbers follow.

    Raises:
        StorageError: If the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None
        self.renew()

    def __enter__(self) -> ReservedName:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def renew(self) -> Path:
        """Return the path; the next one if another program has put a file there since."""
        while self._lock is None or os.path.lexists(self.path):
            self.release()
            self.path = unused_path(self.path)
            self._lock = try_lock(_locked_name(self.path))
            if self._lock is None:
                self.path = _next(self.path)
        return self.path

    def release(self) -> None:
        """Let others have the name."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


_LOCKED = ".blockskip"


def _locked_name(path: Path) -> Path:
    """Return what is locked for a LoRA file: nothing that is seen, and nothing that the host counts as a file of that name."""
    return path.with_name(f".{path.stem}{_LOCKED}")


def require_writable(path: Path) -> None:
    """Check before a long run that a file of this name can be written at its end; remove what killed runs have left.

    Raises:
        StorageError: If the disk refuses.
    """
    name = re.escape(_parts(path)[0])
    temporary = re.compile(
        rf"({name}_\d{{5,}}_)(step\d+(_\d+)?)?\.(safetensors|html|png)(\.[0-9a-f]{{8}})?\.(part|trial)"
    )

    def is_abandoned(name: str) -> bool:
        found = temporary.fullmatch(name)
        held = try_lock(_locked_name(path.with_name(f"{found[1]}.safetensors"))) if found else None
        if held is None:
            return False
        held.release()
        return True

    remove_leftovers(path.parent, is_abandoned)
    remove_stale_locks(path.parent, f".*{_LOCKED}")
    trial = path.with_name(f"{path.name}.{unique_token()}.trial")
    try:
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as error:
        raise StorageError(f"{path.name} cannot be written: {error}. Choose another output_name.") from error


def save_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path) -> None:
    """Write a LoRA file with metadata; afterwards there is either the complete file or none.

    Raises:
        StorageError: If the disk refuses.
    """
    strings = metadata_to_strings(metadata)
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=strings))


def file_stamp(name: str) -> str:
    """Return a value that changes whenever a file of the loras folders is rewritten; empty if there is no such file."""
    path = folder_paths.get_full_path("loras", name) if name in folder_paths.get_filename_list("loras") else None
    if path is None:
        return ""
    status = Path(path).stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def load_lora_file(name: str) -> LoraModel:
    """Read a file of the loras folders.

    Raises:
        LoraFileError: If it is missing or not a LoRA file.
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
            raise LoraFileError(
                f"The LoRA to start from is not a plain LoRA: {key} has more parts, as in DoRA or LoCon."
            )
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
    """Return what the host makes of a LoRA; it assumes that the tensors are what their names say."""
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
    """Return a LoRA's description of itself, several lines."""
    lines = [f"{num_patched} layers patched, {len(lora)} tensors."]
    if not metadata:
        return "\n".join([*lines, "The file says nothing of itself: it was not saved by BlockSkip."])
    lines.extend(f"{name.replace('_', ' ')}: {value}" for name, value in metadata.items())
    return "\n".join(lines)

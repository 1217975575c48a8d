"""LoRA files and the host's LORA_MODELs: where they are written, with metadata, and how they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...adapters.lora_metadata import metadata_from_strings, metadata_of_others, metadata_to_strings
from ...errors import InvalidInputError, LoraFileError, StorageError
from ...files import content_hash, open_tensors, remove_leftovers, unique_token, write_atomically
from ...locks import Lock, remove_stale_locks, try_lock
from .names import name_below

NO_FILE = "none"
"""The entry in a list of files that means no file."""

EXAMPLE_NAME = "loras/my_lora"
"""A valid name, for messages."""


class LoraModel(dict):
    """A LORA_MODEL of the host (name -> tensor) that also carries metadata."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def output_path(prefix: str) -> Path:
    """Return a file that does not exist yet, below the output folder, e.g. "loras/toy" -> loras/toy_00001_.safetensors.

    Raises:
        InvalidInputError: If the prefix is not a valid name on every system, or leads out of the output folder.
        StorageError: If its folder cannot be created.
    """
    output = Path(folder_paths.get_output_directory())
    typed = name_below(prefix, EXAMPLE_NAME)
    _require_no_link_out(output, typed)
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(str(typed), str(output))
    except OSError as error:
        raise StorageError(f"Cannot create the folder of {prefix!r}: {error}. Choose another output_name.") from error
    return unused_path(Path(folder) / f"{name}_{max(counter, 1):05}_.safetensors")


def _require_no_link_out(output: Path, name: PurePosixPath) -> None:
    """Refuse links that lead out of the output folder; ComfyUI does so too since 0.30, but without saying why."""
    inside = output.resolve()
    for folder in reversed(name.parents[:-1]):
        there = (output / folder).resolve()
        if not there.is_relative_to(inside):
            raise InvalidInputError(
                f"{output.name}/{folder} is a link to {there}, outside ComfyUI's output folder, and nothing is saved "
                "through such a link. Choose an output_name in another folder and move the file afterwards, or put the "
                "whole output folder on the other disk: start ComfyUI with --output-directory."
            )


_COUNTED = re.compile(r"(?P<name>.*)_(?P<counter>\d{5,})_\.safetensors", re.DOTALL)


def unused_path(path: Path) -> Path:
    """Return the path, or the next numbered one that does not exist yet.

    The host counts files by the name as typed, so it misses those of "loras/" and the like; and another program may
    have taken the name in the meantime.
    """
    while os.path.lexists(path):  # False for a name that is too long, where Path.exists raises
        path = _next(path)
    return path


def _next(path: Path) -> Path:
    name, counter = _parts(path)
    return path.with_name(f"{name}_{counter + 1:05}_.safetensors")


def _parts(path: Path) -> tuple[str, int]:
    """Return name and counter of a file numbered by the host."""
    counted = _COUNTED.fullmatch(path.name)
    assert counted is not None, f"{path.name} has no number"
    return counted["name"], int(counted["counter"])


def events_folder(lora: Path, key: str, part: str = "") -> Path:
    """Return the folder of a run's files for TensorBoard, e.g. loras/tensorboard/toy-0123abcd for loras/toy_00001_.

    Args:
        lora: The LoRA's file; all of one name share the folder, whatever their number.
        key: The run's content hash.
        part: Which training this is, if several write to one file; follows the name, as in toy_2x-0123abcd.

    Raises:
        InvalidInputError: If a link leads out of the output folder.
    """
    name = "_".join(filter(None, (_parts(lora)[0], part)))
    return events_folder_named(lora.with_name(name), key)


def events_folder_named(named: Path, key: str) -> Path:
    """Return the folder for TensorBoard of a run whose results are not numbered files below the output folder.

    Args:
        named: Folder and name, absolute or below the output folder.
        key: The run's content hash.

    Raises:
        InvalidInputError: If a link leads out of the output folder.
    """
    output = Path(folder_paths.get_output_directory())
    folder = output / named.parent / "tensorboard" / f"{named.name}-{key[:8]}"
    _require_no_link_out(output, PurePosixPath(Path(os.path.relpath(folder / "events", output)).as_posix()))
    return folder


def word_samples(named: Path, key: str) -> Path:
    """Return the path beside which pictures of a word are saved, as beside a LoRA: in a folder of the output folder.

    Args:
        named: The word's folder and name.
        key: What the pictures depend on, as a content hash.

    Raises:
        InvalidInputError: If a link leads out of the output folder.
    """
    output = Path(folder_paths.get_output_directory())
    name = PurePosixPath((named.parent / "words" / f"{named.name}-{key[:8]}_.safetensors").as_posix())
    _require_no_link_out(output, name)
    return output / name


class ReservedName:
    """Reserves a file's name, and all names that begin with it, against other runs until it is released.

    Attributes:
        path: The file, which does not exist yet.

    Args:
        path: The first name to try; the next numbers follow.

    Raises:
        StorageError: If the disk cannot be written.
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
        """Return the path, or the next one if another program has created that file in the meantime."""
        while self._lock is None or os.path.lexists(self.path):
            self.release()
            self.path = unused_path(self.path)
            self._lock = try_lock(_locked_name(self.path))
            if self._lock is None:
                self.path = _next(self.path)
        return self.path

    def release(self) -> None:
        """Free the name for others."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


_LOCKED = ".blockskip"


def _locked_name(path: Path) -> Path:
    """Return the lock file's name for a LoRA file: hidden, and not counted by the host as a file of that name."""
    return path.with_name(f".{path.stem}{_LOCKED}")


def require_writable(path: Path) -> None:
    """Check before a long run that its file can be written in the end; remove leftovers of killed runs.

    Raises:
        StorageError: If the disk cannot be written.
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
    """Write a LoRA file with metadata, completely or not at all.

    Raises:
        StorageError: If the disk cannot be written.
    """
    strings = metadata_to_strings(metadata, title=path.stem.strip("_"))
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=strings))


def file_identity(name: str | None) -> str:
    """Return a content hash of a file in the loras folders; empty if it cannot be read or is not listed yet."""
    if name not in folder_paths.get_filename_list("loras"):
        return ""
    try:
        path = Path(folder_paths.get_full_path_or_raise("loras", name))
        status = path.stat()
        return _content_hash(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError:  # loading it reports why
        return ""


@lru_cache(maxsize=64)
def _content_hash(path: Path, *stamp: int) -> str:
    """Return the hash of a file; a known file is read again only if its size or timestamps have changed."""
    return content_hash(path)


def require_lora_file(name: str) -> Path:
    """Return the path of a file in the loras folders.

    Raises:
        LoraFileError: If it is missing.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None or name not in folder_paths.get_filename_list("loras"):
        raise LoraFileError(f"There is no {name!r} in ComfyUI's loras folders. Refresh the list and choose again.")
    return Path(path)


def load_lora_file(name: str) -> LoraModel:
    """Read a file from the loras folders.

    Raises:
        LoraFileError: If it is missing or not a LoRA file.
    """
    path = require_lora_file(name)
    if path.suffix not in (".safetensors", ".sft"):
        raise LoraFileError(f"{name} is not a safetensors file; other formats can carry code and are not read.")
    try:
        with open_tensors(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            strings = file.metadata()
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{name} cannot be read as a LoRA file. It may be damaged or still downloading.") from error
    return LoraModel(tensors, metadata_from_strings(strings) or metadata_of_others(strings))

"""Embedding files: a learned word in ComfyUI's embeddings folder, to be used as ``embedding:NAME`` in any prompt.

Each text encoder finds its vectors under its own key. A file is written completely or not at all, never over another
one, and read back through the host's own reader. Every file gets a new number, because the host caches encoded
prompts by their text: a prompt with the same name and other vectors would not be encoded again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import comfy.sd1_clip
import folder_paths
import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InvalidInputError, StorageError
from ...files import remove_leftovers, unique_token, write_atomically
from ...locks import lock
from .names import name_below

EXAMPLE = "my_word"
_ENDS_A_NAME = re.compile(r"[^\w./\\-]")
"""What the host's tokenizers take as the end of a name, or as a weight: blanks, commas, brackets, colons."""


def embedding_name(typed: str) -> PurePosixPath:
    """Return a word's name, perhaps with folders, after checking that a file and a prompt can have it.

    Raises:
        InvalidInputError: If it is not a name on every system, leads out of the folder, or cannot be written in a prompt.
    """
    found = _ENDS_A_NAME.search(typed)
    if found:
        raise InvalidInputError(
            f"The name {typed!r} has {found[0]!r} in it, at which a prompt ends a word's name. Use letters, digits, _ and -."
        )
    return name_below(typed, EXAMPLE)


class EmbeddingName:
    """Where a word will be saved, checked before a long run.

    Args:
        typed: The name, perhaps with folders, below the embeddings folder.

    Raises:
        InvalidInputError: If it is not a name on every system, leads out of the folder, or cannot be written in a
        prompt.
        StorageError: If the folder cannot be written.
    """

    def __init__(self, typed: str) -> None:
        self._name = embedding_name(typed)
        folders = folder_paths.get_folder_paths("embeddings")
        self._root = Path(folders[0])
        self._folder = self._root / self._name.parent
        if not self._folder.resolve().is_relative_to(self._root.resolve()):
            raise InvalidInputError(
                f"{self._name.parent} is a link out of ComfyUI's embeddings folder, and nothing is saved through it."
            )
        self._require_writable()

    @property
    def name(self) -> PurePosixPath:
        """Folders and name, without a number, as they mean on every system."""
        return self._name

    def _require_writable(self) -> None:
        pattern = re.compile(rf"{re.escape(self._name.name)}_\d{{5,}}\.safetensors\.[0-9a-f]{{8}}\.(part|trial)")
        remove_leftovers(self._folder, lambda name: pattern.fullmatch(name) is not None)
        trial = self._folder / f"{self._name.name}_00000.safetensors.{unique_token()}.trial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise StorageError(f"The embeddings folder {self._folder} cannot be written: {error}.") from error

    def save(self, vectors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
        """Write a word under the next free number and read it back; return what to write in a prompt.

        Args:
            vectors: Each encoder's vectors by its key, shape (vectors, width).
            about: Recorded in the file, as JSON.

        Raises:
            StorageError: If it cannot be written, or is not read back as it was written.
        """
        tensors = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in vectors.items()}
        with lock(self._folder / f".{self._name.name}", lambda: None):
            path = self._next()
            metadata = {"format": "pt", "modelspec.title": path.stem, "blockskip_word": json.dumps(dict(about))}
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        name = (self._name.parent / path.stem).as_posix()
        _require_read_back(name, tensors)
        return f"embedding:{name}"

    def _next(self) -> Path:
        """Return the path with the next number that no folder of embeddings has for this name.

        The host also looks into all folders below, in no fixed order, so the same name in two of them could mean either.
        """
        wanted = re.compile(rf"{re.escape(self._name.name)}_(\d{{5,}})\.[^.]+", re.IGNORECASE)
        folders = folder_paths.get_folder_paths("embeddings")
        files = (name for folder in folders for _, _, names in os.walk(folder, followlinks=True) for name in names)
        taken = {int(found[1]) for name in files if (found := wanted.fullmatch(name))}
        number = next(number for number in itertools.count(1) if number not in taken)
        return self._folder / f"{self._name.name}_{number:05}.safetensors"


def _require_read_back(name: str, tensors: Mapping[str, Tensor]) -> None:
    folders = folder_paths.get_folder_paths("embeddings")
    for key, tensor in tensors.items():
        found = comfy.sd1_clip.load_embed(name, folders, tensor.shape[-1], key)
        if found is None or not torch.equal(found, tensor):
            raise StorageError(
                f"The word was saved as {name}, but ComfyUI reads other numbers for {key} under that name. Look at the disk "
                f"and at the folders in extra_model_paths.yaml."
            )

"""What a run is trained on, in one safetensors file: latents, encoded captions, and a LoRA to start from.

Captions are containers of the host's own making. Their tensors are stored as they are, and everything around them as
JSON in the file's metadata, as nested pairs of a kind and a content:

    ["tensor", name]   ["list", [...]]   ["dict", {...}]   ["value", number, text, true, false or null]

A tensor that several captions share, as the training examples of an edit model share their texts, is stored once, under
the name of its first place, and is one tensor again when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..data.latents import Latents
from ..errors import InvalidInputError
from ..files import content_hash, open_tensors, write_atomically

_LATENTS = "latents"
_LATENT = "latent/"  # prefix of the names of draws' latents if they differ in shape
_START = "start/"  # prefix of the names of the LoRA's tensors
_CAPTIONS = "captions"  # key of the metadata


@dataclass(frozen=True)
class Material:
    """What a run is trained on.

    Attributes:
        latents: Clean latents of all draws in the model's own scale, each (C, H, W).
        captions: Encoded captions, in the host's form.
        start: The LoRA to train further, by the host's names; empty to start from nothing.
    """

    latents: Latents = field(repr=False)
    captions: Sequence[Any] = field(repr=False)
    start: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def write_material(material: Material, path: Path) -> str:
    """Write the file, completely or not at all, and return its content hash.

    Raises:
        InvalidInputError: If a caption holds something else than tensors, numbers and text.
        StorageError: If the disk cannot be written.
    """
    tensors = _packed_latents(material.latents)
    tensors.update({_START + name: _plain(tensor) for name, tensor in material.start.items()})
    captions = list(material.captions)  # kept, so that the ids of its tensors stay theirs
    packed = _pack(captions, "caption", tensors, {})
    metadata = {"format": "pt", _CAPTIONS: json.dumps(packed)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return content_hash(path)


def read_material(path: Path, expected_hash: str) -> Material:
    """Read what :func:`write_material` wrote.

    Raises:
        InvalidInputError: If it is another file than the hash says, or damaged.
    """
    try:
        if content_hash(path) != expected_hash:
            raise InvalidInputError(
                f"{path.name} has changed since the run file was written beside it. Copy both again, or write them again."
            )
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            packed = json.loads((file.metadata() or {})[_CAPTIONS])
        captions = _unpack(packed, tensors.__getitem__)
        start = {name.removeprefix(_START): x for name, x in tensors.items() if name.startswith(_START)}
        return Material(_unpacked_latents(tensors), captions, start)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{path.name} cannot be read: {error}. Copy it again, or write it again.") from error


def _packed_latents(latents: Latents) -> dict[str, Tensor]:
    """Return latents by name: one tensor if all have one shape, otherwise one for each draw."""
    if isinstance(latents, Tensor):
        return {_LATENTS: _plain(latents)}
    return {f"{_LATENT}{draw}": _plain(one) for draw, one in enumerate(latents)}


def _unpacked_latents(tensors: Mapping[str, Tensor]) -> Latents:
    if _LATENTS in tensors:
        return tensors[_LATENTS]
    return [tensors[f"{_LATENT}{draw}"] for draw in range(sum(name.startswith(_LATENT) for name in tensors))]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _pack(content: Any, place: str, tensors: dict[str, Tensor], names: dict[int, str]) -> list[Any]:
    """Return a container as JSON, and put its tensors into ``tensors``, under names that begin with ``place``.

    ``names`` are those of the tensors so far, by ``id``.
    """
    if isinstance(content, Tensor):
        if id(content) not in names:
            names[id(content)] = place
            tensors[place] = _plain(content)
        return ["tensor", names[id(content)]]
    if isinstance(content, Mapping):
        return ["dict", {str(key): _pack(value, f"{place}/{key}", tensors, names) for key, value in content.items()}]
    if isinstance(content, (list, tuple)):
        return ["list", [_pack(value, f"{place}/{number}", tensors, names) for number, value in enumerate(content)]]
    if isinstance(content, (str, int, float, bool, type(None))):
        return ["value", content]
    raise InvalidInputError(
        f"A caption holds a {type(content).__name__} ({place}), which a file cannot keep. Encode the captions with a "
        "plain text encoder node."
    )


def _unpack(packed: Any, tensor: Callable[[str], Tensor]) -> Any:
    kind, content = packed
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: _unpack(value, tensor) for key, value in content.items()}
    if kind == "list":
        return [_unpack(value, tensor) for value in content]
    if kind == "value" and isinstance(content, (str, int, float, bool, type(None))):
        return content
    raise ValueError(f"{kind!r} is not a kind of content")

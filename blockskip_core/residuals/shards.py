"""Files of stored residuals: names of shards, manifests with a digest, and tensors with a checksum."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CacheError, StorageError
from ..files import open_tensors

STORED_AS = "stored as"  # of a tensor that is in its shard under the key of another draw
SHARD_NAME = re.compile(r"shard-\d{5,9}\.safetensors")


def draw_of(key: str) -> int:
    """Return the draw of a tensor's key, "draw/name"."""
    return int(key.split("/", 1)[0])


def shard_number(entry: Mapping[str, object]) -> int:
    """Return the number in the name of a tensor's shard."""
    return int(str(entry["shard"]).removeprefix("shard-").removesuffix(".safetensors"))


def read_checked(path: Path, key: str, entry: Mapping[str, object]) -> Tensor:
    """Read one tensor of a shard.

    Raises:
        CacheError: If it is not the tensor that was written.
    """
    try:
        with open_tensors(path) as shard:
            return checked(shard.get_tensor(str(entry.get(STORED_AS, key))), entry)
    except (SafetensorError, FileNotFoundError, ValueError) as error:
        raise CacheError(damaged(path.parent, path.name)) from error
    except OSError as error:
        raise unreadable(path.parent, error) from error


def checked(tensor: Tensor, entry: Mapping[str, object]) -> Tensor:
    """Return a tensor that matches its entry; raise ValueError otherwise."""
    form = (list(tensor.shape), str(tensor.dtype))
    if form != (entry["shape"], entry["dtype"]) or checksum(tensor) != entry["checksum"]:
        raise ValueError("It is not what was written.")
    return tensor


def read_manifest(folder: Path, name: str) -> dict:
    """Return what a manifest says.

    Raises:
        CacheError: If there is none, or it is damaged.
        StorageError: If it cannot be read.
    """
    path = folder / name
    if not path.is_file():
        raise CacheError("The stored residuals are missing or unfinished.")
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.blake2b(outer["body"].encode(), digest_size=16).hexdigest() != outer["digest"]:
            raise CacheError(damaged(folder, name))
        body = json.loads(outer["body"])
        _require_form(body)
        return body
    except CacheError:
        raise
    except OSError as error:
        raise unreadable(folder, error) from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CacheError(damaged(folder, name)) from error


def _require_form(body: dict) -> None:
    """Raise an ordinary error if a manifest's content is not in the form that a cache writes."""
    body["identity"].keys()
    for key, entry in body["tensors"].items():
        draw, _ = key.split("/", 1)
        int(draw)
        if not isinstance(entry["shard"], str) or not isinstance(entry["checksum"], int):
            raise TypeError(key)
        if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
            raise TypeError(key)


def unreadable(folder: Path, error: OSError) -> StorageError:
    """Return an error that advises trying again; nothing is removed, because the disk may work again later."""
    return StorageError(
        f"The stored residuals in {folder.name} cannot be read: {error}. Run again when the disk is available."
    )


def damaged(folder: Path, name: str) -> str:
    """Return a sentence about a damaged file."""
    return f"The stored residuals in {folder.name} are damaged ({name})."


def look(entry: Mapping[str, object]) -> tuple[object, ...]:
    """Return what entries of equal tensors have in common."""
    return entry["checksum"], str(entry["shape"]), entry["dtype"]


def checksum(tensor: Tensor) -> int:
    """Return the checksum of a tensor's bytes."""
    if tensor.numel() == 0:
        return 0
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

"""Stored residuals on disk: memory-mapped safetensors shards and a manifest.

What is stored for a draw (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.3, Eq. 3):

    front.img, front.txt   tokens leaving the front span; exact, because no adapter comes before them
    back                   what the back span adds to the image tokens, as the sum of its blocks' differences; with a
                           response, minus the linear part
    back.txt               what it adds to the text tokens, if kept blocks follow
    latent                 the clean latent of the draw's crop
    reference              the full model's clean estimate, for the first draw of a chunk
    *.scale                scales of tensors that are stored in eight bits (``format``)
    response.*             the back span's linear response to its input (``back_response``), with the first draw

Tokens of text that no draw changes are stored once: in models whose text does not see noise level and picture (Qwen-Image 2.1),
what leaves the front for it is the same for every draw of a caption, bit for bit. The manifest then names where it is.

The manifest says what the residuals were made from and holds a checksum of every tensor. A folder whose manifest does
not match, or a tensor that does not match its checksum, is never used. Shards are written first, each under a temporary
name that is then renamed; the manifest is written last, so a folder without one is unfinished. Until then a manifest
under another name lists the complete shards, and an interrupted writer continues after them.

This module does no locking: callers hold a lock on a folder that they write or remove, and a shared lock on one that
they read (``locks``, ``sources``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..blocks.replay import Residual
from ..errors import CacheError, InvalidInputError, StorageError
from ..files import open_tensors, remove_leftovers, what_helps, write_atomically
from ..units import format_bytes
from .format import ResidualFormat, unpacked
from .shards import (
    SHARD_NAME,
    STORED_AS,
    checked,
    checksum,
    damaged,
    draw_of,
    look,
    read_checked,
    read_manifest,
    shard_number,
    unreadable,
)

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
TEXT = "front.txt"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # the manifest of the shards written so far
TOKEN_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
DISK_RESERVE_BYTES = 256 * 2**20  # left free for other programs


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What residuals were computed from. Two caches are interchangeable if and only if these are equal.

    Attributes:
        model: Content hash of the model's weights and patches.
        schedule: Content hash of the training schedule.
        selection: Content hash of the block selection.
        pictures: Content hash of the pictures and of the VAE that encodes them.
        captions: Content hash of the conditionings.
        dtype: Dtype of the token streams.
        host: Versions of the software that computed them.
        back_residual: Whether back residuals are constants or have a linear response to their input, and what that was
            fitted on.
        residual_format: How their numbers are written, see ``format``.
        version: Format of the cache.
    """

    model: str
    schedule: str
    selection: str
    pictures: str
    captions: str
    dtype: str
    host: str = ""
    back_residual: str = "constant"
    residual_format: ResidualFormat = "exact"
    version: int = CACHE_VERSION

    @property
    def token_dtype(self) -> torch.dtype:
        """``dtype`` as torch's own object.

        Raises:
            InvalidInputError: If it is none that token streams have.
        """
        name = self.dtype.removeprefix("torch.")
        if name not in TOKEN_DTYPES:
            raise InvalidInputError(f"Residuals have one of the dtypes {', '.join(TOKEN_DTYPES)}, got {self.dtype!r}.")
        return TOKEN_DTYPES[name]

    @property
    def key(self) -> str:
        """Content hash of everything, 32 hexadecimal digits; the name of the cache's folder."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def difference(self, other: Mapping[str, object]) -> list[str]:
        """Return the names of the fields in which a manifest's identity differs."""
        return [name for name, value in asdict(self).items() if other.get(name) != value]


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Check that ``folder``'s disk has enough space, before anything is written.

    Raises:
        InvalidInputError: If not, with predicted and free bytes.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes + DISK_RESERVE_BYTES > free:
        raise InvalidInputError(
            f"The residuals would take {format_bytes(needed_bytes)} on disk, but {format_bytes(free)} are free. "
            "Use fewer training examples, or set storage to `chunked` or `on the fly`."
        )


class CacheWriter:
    """Writes a cache: shard by shard, the manifest last.

    Args:
        folder: The cache's own folder.
        identity: What the residuals are computed from.
        resume: Whether to keep the complete shards of an unfinished cache and continue after them; if False, it is
            replaced.

    Attributes:
        draws: The draws in complete shards.

    Raises:
        StorageError: If the disk cannot be written.
    """

    def __init__(self, folder: Path, identity: CacheIdentity, *, resume: bool = False) -> None:
        self._folder = folder
        self._identity = identity
        self._tensors = _whole_draws(folder, identity) if resume else {}
        if identity.back_residual != "constant" and not any(key.startswith("0/") for key in self._tensors):
            self._tensors = {}  # the response that the others were computed with is stored with draw 0
        texts = {key: entry for key, entry in self._tensors.items() if key.endswith("/" + TEXT)}
        self._texts = {look(entry): (key, entry) for key, entry in texts.items() if STORED_AS not in entry}
        self._num_shards = 1 + max((shard_number(entry) for entry in self._tensors.values()), default=-1)
        self.draws = set(map(draw_of, self._tensors))
        try:
            if not self._tensors and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The folder for residuals cannot be created: {error}.") from error
        remove_leftovers(folder, lambda name: True, min_age_s=0)

    def write(self, records: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write one shard: draw index -> name -> tensor.

        Raises:
            StorageError: If the disk cannot be written; nothing half-written is left.
        """
        name = f"shard-{self._num_shards:05d}.safetensors"
        flat = {f"{draw}/{key}": x.cpu().contiguous() for draw, record in records.items() for key, x in record.items()}
        entries: dict[str, dict[str, object]] = {}
        for key, tensor in flat.items():
            form = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
            entry: dict[str, object] = {"shard": name, "checksum": checksum(tensor), **form}
            entries[key] = self._stored_before(key, tensor, entry, flat) or entry
        own = {key: tensor for key, tensor in flat.items() if STORED_AS not in entries[key]}
        write_atomically(self._folder / name, lambda path: save_file(own, path))
        self._tensors.update(entries)
        self._num_shards += 1
        self.draws.update(records)
        self.write_unfinished()

    def adopt(self, part: Path) -> None:
        """Take over what is intact of another unfinished cache of the same residuals, and remove it if that is all.

        Shards are renamed, not copied. If that is interrupted, draws are computed again, and nothing is misread. What
        cannot be read stays where it is: on a shared disk it may be what another machine has just written.

        Raises:
            StorageError: If the disk cannot be written.
        """
        found = _whole_draws(part, self._identity, known=self.draws)
        for number, shard in enumerate(sorted({str(entry["shard"]) for entry in found.values()}), self._num_shards):
            name = f"shard-{number:05d}.safetensors"
            try:
                os.replace(part / shard, self._folder / name)
            except OSError as error:
                raise StorageError(
                    f"{shard} of {part.name} could not be moved: {error}. {what_helps(error)}"
                ) from error
            self._tensors.update({key: {**e, "shard": name} for key, e in found.items() if e["shard"] == shard})
            self._num_shards = number + 1
        self.draws = set(map(draw_of, self._tensors))
        self.write_unfinished()
        with contextlib.suppress(CacheError):
            if stored_draws(part, self._identity) <= self.draws:
                remove_cache(part)

    def write_unfinished(self) -> None:
        """Write the manifest of the shards so far, from which an interrupted writer continues."""
        self._write_manifest(UNFINISHED)

    def _stored_before(
        self, key: str, tensor: Tensor, entry: dict[str, object], flat: Mapping[str, Tensor]
    ) -> dict[str, object] | None:
        """Return the entry of a text that is stored already, bit for bit; None if it is not, or no text."""
        if not key.endswith("/" + TEXT):
            return None
        first, found = self._texts.setdefault(look(entry), (key, entry))
        before = flat[first] if first in flat else self.read(first)
        same = first != key and before is not None and torch.equal(before, tensor)
        return {**found, STORED_AS: first} if same else None

    def read(self, key: str) -> Tensor | None:
        """Return a written tensor by its key "draw/name", or None."""
        entry = self._tensors.get(key)
        return None if entry is None else read_checked(self._folder / str(entry["shard"]), key, entry)

    def finish(self) -> None:
        """Write the manifest, which makes the cache complete."""
        self._write_manifest(MANIFEST)
        with contextlib.suppress(OSError):  # only the other manifest counts now
            (self._folder / UNFINISHED).unlink()

    def _write_manifest(self, name: str) -> None:
        body = json.dumps({"identity": asdict(self._identity), "tensors": self._tensors}, sort_keys=True)
        digest = hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
        text = json.dumps({"digest": digest, "body": body})
        write_atomically(self._folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def discard(self) -> None:
        """Remove the folder and everything in it."""
        remove_cache(self._folder)


class ResidualCache:
    """A finished cache, opened for reading. Shards are memory-mapped; every tensor is checked when it is read.

    Args:
        folder: Where :class:`CacheWriter` wrote it.
        identity: What the residuals must have been computed from.

    Raises:
        CacheError: If the folder is unfinished, damaged, or was made from something else.
    """

    def __init__(self, folder: Path, identity: CacheIdentity) -> None:
        self._folder = folder
        self._identity = identity
        body = read_manifest(folder, MANIFEST)
        differing = identity.difference(body["identity"])
        if differing:
            raise CacheError(f"The stored residuals belong to another {' and '.join(differing)}.")
        self._tensors: dict[str, dict[str, object]] = body["tensors"]
        self._shards: dict[str, safe_open] = {}
        self._names: dict[int, list[str]] = {}
        for key in self._tensors:
            draw, name = key.split("/", 1)
            self._names.setdefault(int(draw), []).append(name)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, draw: int, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Return the tensors of one draw whose names are wanted, name -> CPU tensor.

        Raises:
            CacheError: If the draw is absent, or a tensor does not match its checksum.
        """
        if draw not in self._names:
            raise CacheError(f"Training example {draw} is not among the stored residuals.")
        return {name: self._read_tensor(f"{draw}/{name}") for name in self._names[draw] if wanted(name)}

    def verify(self, draws: Collection[int] | None = None) -> None:
        """Read every tensor once, or every one of some draws.

        Raises:
            CacheError: If one does not match its checksum.
        """
        for key in self._tensors:
            if draws is None or int(key.split("/", 1)[0]) in draws:
                self._read_tensor(key)

    def close(self) -> None:
        """Release the shards; some systems refuse to delete a file that is mapped."""
        self._shards.clear()

    def draws_with(self, name: str) -> list[int]:
        """Return the draws that have a tensor of this name."""
        return sorted(draw for draw, names in self._names.items() if name in names)

    def residual(self, draw: int) -> Residual:
        """Return the residual of one draw; see :meth:`read`."""
        stored = self.read(draw, wanted=lambda name: name.startswith(("front", "back")))
        return Residual.from_tensors(unpacked(stored, self._identity.token_dtype))

    def first(self, name: str) -> tuple[int, Tensor] | None:
        """Return the first draw that has a tensor of this name, and a copy of the tensor, which may outlive the cache.

        What :meth:`read` returns keeps the whole file mapped, so that its space is not freed when it is deleted.
        """
        draws = self.draws_with(name)
        return (draws[0], self._read_tensor(f"{draws[0]}/{name}").clone()) if draws else None

    def require_first(self, name: str) -> tuple[int, Tensor]:
        """Like :meth:`first`, but refuse a cache without such a tensor.

        Raises:
            CacheError: If there is none.
        """
        found = self.first(name)
        if found is None:
            raise CacheError(damaged(self._folder, MANIFEST))
        return found

    def _read_tensor(self, key: str) -> Tensor:
        entry = self._tensors[key]
        try:
            return checked(self._shard(str(entry["shard"])).get_tensor(str(entry.get(STORED_AS, key))), entry)
        except CacheError:
            raise
        except (SafetensorError, FileNotFoundError, ValueError) as error:
            raise CacheError(damaged(self._folder, str(entry["shard"]))) from error
        except OSError as error:
            raise unreadable(self._folder, error) from error

    def _shard(self, name: str) -> safe_open:
        if name not in self._shards:
            if not SHARD_NAME.fullmatch(name):
                raise CacheError(damaged(self._folder, MANIFEST))
            self._shards[name] = open_tensors(self._folder / name)
        return self._shards[name]


def is_finished(folder: Path) -> bool:
    """Return whether this folder has a completely written cache."""
    return (folder / MANIFEST).is_file()


def stored_draws(folder: Path, identity: CacheIdentity) -> set[int]:
    """Return the draws that an unfinished cache says it has, without reading them.

    Raises:
        CacheError: If there is none, it is damaged, or it was made from something else.
    """
    body = read_manifest(folder, UNFINISHED)
    differing = identity.difference(body["identity"])
    if differing:
        raise CacheError(f"The stored residuals belong to another {' and '.join(differing)}.")
    return set(map(draw_of, body["tensors"]))


def num_shards(folder: Path) -> int:
    """Return the number of complete shards in a folder."""
    try:
        return sum(SHARD_NAME.fullmatch(path.name) is not None for path in folder.iterdir())
    except OSError:  # it does not exist yet
        return 0


def remove_cache(folder: Path) -> None:
    """Remove a cache. The manifests go first, so that a half-removed cache is not mistaken for a complete one."""
    for name in (MANIFEST, UNFINISHED):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _whole_draws(folder: Path, identity: CacheIdentity, known: Collection[int] = ()) -> dict[str, dict[str, object]]:
    """Return the tensors of those draws of an unfinished cache that are intact, except draws that are known."""
    if not (folder / UNFINISHED).is_file():
        return {}
    found: dict[str, dict[str, object]] = {}
    try:
        body = read_manifest(folder, UNFINISHED)
        if identity.difference(body["identity"]):
            return {}
    except CacheError as error:
        logger.warning("BlockSkip: cannot resume the unfinished residuals; computing them again: %s", error)
        return {}
    draws: dict[int, dict[str, dict[str, object]]] = {}
    for key, entry in body["tensors"].items():
        draws.setdefault(draw_of(key), {})[key] = entry
    damage: list[CacheError] = []
    for draw, entries in draws.items():
        try:
            if draw not in known:
                _require_intact(folder, entries)
                found.update(entries)
        except CacheError as error:
            damage.append(error)
    if damage:
        logger.warning(
            "BlockSkip: cannot resume %d of %d unfinished residuals; computing them again: %s",
            len(damage), len(draws), damage[0],
        )  # fmt: skip
    return found


def _require_intact(folder: Path, entries: Mapping[str, Mapping[str, object]]) -> None:
    for key, entry in entries.items():
        if not SHARD_NAME.fullmatch(str(entry["shard"])):
            raise CacheError(damaged(folder, UNFINISHED))
        read_checked(folder / str(entry["shard"]), key, entry)

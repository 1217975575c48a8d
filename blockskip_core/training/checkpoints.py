"""Training states on disk: an interrupted run resumes from one and ends with the very weights it would have had.

A state is all that the next step depends on: the LoRA, the optimiser's moments, and how many steps were done. There is no
random generator in it, because every random decision of a run is in its schedule (``data.schedule``), and the first values of the
LoRA follow from its seed. The learning rate follows from the number of steps.

Each run has a folder, named by the content hash of what it is (:class:`RunIdentity`). So the same run finds its
states again, and another run cannot take them by mistake. A lock keeps two processes out of one folder. The length of a
run is no part of its identity: more steps continue a finished run. A state is one safetensors file, written whole or not
at all, with a checksum over its tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, InvalidInputError, StorageError
from ..files import open_tensors, remove_leftovers, write_atomically
from ..locks import lock, remove_stale_locks, try_lock

logger = logging.getLogger(__name__)

STATE_VERSION = 1
KEPT_RUNS = 3  # folders with states that stay on disk, newest first
_LOSSES = "losses"
_LATER = "Start the run again when the disk is back, or turn resume off."


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, apart from its length: two runs with equal parts have equal weights after equal steps.

    Attributes:
        parts: Name -> what it is; JSON.
    """

    parts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Content hash, 32 hexadecimal digits; the name of the run's folder."""
        return hashlib.blake2b(json.dumps(self.parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def difference(self, other: Mapping[str, Any]) -> list[str]:
        """Return the names of the parts that differ."""
        names = sorted({*self.parts, *other})
        return [name for name in names if self.parts.get(name) != other.get(name)]


@dataclass(frozen=True)
class TrainingState:
    """Where a run is.

    Attributes:
        step: Optimiser steps done.
        losses: Of every micro-batch so far.
        tensors: The LoRA's and the optimiser's, by name; on the CPU.
        numbers: Those parts of the optimiser's state that are not tensors, by name.
    """

    step: int
    losses: list[float]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class Checkpoints:
    """The states of one run.

    Args:
        folder: The run's own folder.
        identity: What the run is.
        every: Steps between two states; 0 writes one only when a run ends, however it ends.
        keep: How many of the newest states to keep.
        resume: Whether to resume from an earlier state. If False, earlier states are kept, because the run reaches the
            same result.

    Attributes:
        resume: As given; a run that has to start over sets it, to resume from what it has saved itself.

    Raises:
        InvalidInputError: If a number is out of range.
    """

    def __init__(self, folder: Path, identity: RunIdentity, *, every: int, keep: int, resume: bool = True) -> None:
        if every < 0 or keep < 1:
            raise InvalidInputError(
                f"save_every must not be negative and keep_last must be at least 1, got {every} and {keep}."
            )
        self._folder, self._identity = folder, identity
        self._every, self._keep, self.resume = every, keep, resume
        self._saved: int | None = None

    @contextmanager
    def to_itself(self, waiting: Callable[[int], object]) -> Iterator[None]:
        """Keep other processes from training the same run, until the end of a ``with`` block.

        If one does so already, it is waited for: this run then continues from its states, or finds all steps done.

        Args:
            waiting: Called again and again meanwhile with the step that the other has reached; may raise to give up.

        Raises:
            StorageError: If the disk refuses.
        """
        with lock(self._folder, lambda: waiting(max(map(_step_of, self._states()), default=0))):
            remove_leftovers(self._folder, lambda name: True, min_age_s=0)
            yield

    def is_due(self, step: int) -> bool:
        """Return whether a state should be written after this step."""
        return self._every > 0 and step % self._every == 0

    def save(self, state: TrainingState) -> None:
        """Write a state, unless that step's is there, and remove the oldest before it.

        Raises:
            StorageError: If the disk refuses; earlier states are untouched.
        """
        if state.step == self._saved:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The folder for training states cannot be made: {error}.") from error
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        tensors[_LOSSES] = torch.tensor(state.losses, dtype=torch.float64)
        about = {
            "version": STATE_VERSION,
            "identity": dict(self._identity.parts),
            "step": state.step,
            "numbers": state.numbers,
        }
        about["checksum"] = _checksum(about, tensors)
        metadata = {"format": "pt", "blockskip": json.dumps(about)}
        write_atomically(
            self._folder / f"state-{state.step:08d}.safetensors", lambda p: save_file(tensors, p, metadata)
        )
        self._saved = state.step
        earlier = [path for path in self._states() if _step_of(path) <= state.step]  # later ones are another length's
        for path in earlier[self._keep :]:
            self._remove(path)

    def newest(self, max_step: int) -> TrainingState | None:
        """Return the newest state up to a step, to resume from, or None.

        A damaged one is removed, with a warning, and the one before is taken.

        Raises:
            CheckpointError: If a state is that of another run.
            StorageError: If the disk refuses to read one; it may be whole, so it stays.
        """
        for path in self._states() if self.resume else ():
            if _step_of(path) > max_step:
                continue
            try:
                state = self._read(path)
            except _DamagedError as error:
                logger.warning("BlockSkip: the training state %s is damaged (%s) and is removed", path.name, error)
                self._remove(path)
                continue
            self._saved = state.step
            return state
        return None

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"An old training state cannot be removed: {error}.") from error

    def _states(self) -> list[Path]:
        """The files of this run, newest first."""
        try:
            found = [path for path in self._folder.iterdir() if _step_of(path) >= 0]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"The folder of training states cannot be read: {error}. {_LATER}") from error
        return sorted(found, key=_step_of, reverse=True)

    def _read(self, path: Path) -> TrainingState:
        try:
            with open_tensors(path) as file:
                about = json.loads((file.metadata() or {})["blockskip"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if about.pop("checksum") != _checksum(about, tensors) or about["version"] != STATE_VERSION:
                raise _DamagedError("its checksum or version is another")
            losses = tensors.pop(_LOSSES).tolist()
            differing = self._identity.difference(about["identity"])
            state = TrainingState(int(about["step"]), losses, tensors, dict(about["numbers"]))
        except FileNotFoundError as error:
            raise _DamagedError(str(error)) from error
        except OSError as error:
            raise StorageError(f"The training state {path.name} cannot be read: {error}. {_LATER}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _DamagedError(str(error)) from error
        if differing:
            raise CheckpointError(
                f"The training state {path.name} in {self._folder.name} belongs to another run: it differs in "
                f"{', '.join(differing)}. Move that folder away, or turn resume off."
            )
        return state


class _DamagedError(Exception):
    """A file that is not a complete state."""


def remove_old_runs(parent: Path, *, keep: int, exclude: str) -> None:
    """Remove the folders of all but the ``keep`` newest runs below ``parent`` that no process trains.

    ``exclude`` is the name of one that is kept in any case.
    """
    if not parent.is_dir():
        return
    try:
        runs = [path for path in parent.iterdir() if path.name != exclude and any(path.glob("state-*.safetensors"))]
        for path in sorted(runs, key=lambda path: -path.stat().st_mtime)[keep:]:
            held = try_lock(path)
            if held is None:
                continue
            with held:
                logger.info("BlockSkip: removing the states of the old run %s", path.name)
                shutil.rmtree(path, ignore_errors=True)
        remove_stale_locks(parent)
    except (OSError, StorageError) as error:  # another program may be removing the same
        logger.warning("BlockSkip: the states of old runs cannot be removed: %s", error)


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"state-(\d{8,12})\.safetensors", path.name)
    return int(found[1]) if found else -1


def _checksum(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Training states on disk, from which an interrupted run resumes and ends with exactly the same weights.

A state is everything that the next step depends on: the LoRA, the optimiser's moments, and the number of steps done. It
contains no random generator, because every random decision of a run is in its schedule (``data.schedule``), and the
initial LoRA is determined by its seed. The learning rate is determined by the number of steps.

Each run has a folder, named by the content hash of its identity (:class:`RunIdentity`). So the same run finds its
states again, and no other run can use them by mistake. A lock prevents two processes from using one folder. The length
of a run is not part of its identity, so a finished run can be continued with more steps. A state is one safetensors
file, written completely or not at all, with a checksum over its tensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections import Counter
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
SAMPLES_FILE = "samples.json"
"""Name of the file beside the states that says where a run's samples are."""
KEPT_RUNS = 3  # how many of the newest runs' folders to keep on disk: of unfinished runs, and of finished ones
_LOSSES = "losses"
_LATER = "Start the run again when the disk is available, or turn resume off."


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, apart from its length: two runs with equal parts have equal weights after equal steps.

    Attributes:
        parts: Name -> value, both as JSON.
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
    """The state of a run after some steps.

    Attributes:
        step: Number of optimiser steps done.
        losses: Loss of every micro-batch so far.
        tensors: The LoRA's and the optimiser's tensors, by name; on the CPU.
        numbers: The parts of the optimiser's state that are not tensors, by name.
        planned: Number of steps after which the run is finished; None in states of earlier versions.
    """

    step: int
    losses: list[float]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    planned: int | None = None


class Checkpoints:
    """The states of one run.

    Args:
        folder: The run's own folder.
        identity: What the run is.
        every: Steps between two states; with 0 one is written only when a run ends, however it ends.
        keep: How many of the newest states to keep.
        resume: Whether to resume from an earlier state. If False, earlier states are kept, because the run reaches the
            same result.

    Attributes:
        resume: As given; a run that has to start over sets it to True, to resume from the states that it has saved.

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
        """Prevent other processes from training the same run, for the duration of a ``with`` block.

        If another process is already training it, this waits, and then continues from its states or finds all steps
        done.

        Args:
            waiting: Called repeatedly while waiting, with the step that the other has reached; may raise to give up.

        Raises:
            StorageError: If the disk cannot be written.
        """
        with lock(self._folder, lambda: waiting(max(map(step_of_state, self._states()), default=0))):
            remove_leftovers(self._folder, lambda name: True, min_age_s=0)
            yield

    def is_due(self, step: int) -> bool:
        """Return whether a state should be written after this step."""
        return self._every > 0 and step % self._every == 0

    def try_save(self, state: TrainingState) -> list[str]:
        """Write a state as :meth:`save` does; return a sentence if it cannot be: a run without states is better than no run."""
        try:
            self.save(state)
        except StorageError as error:
            logger.error("BlockSkip: %s", error)
            return [str(error)]
        return []

    def save(self, state: TrainingState) -> None:
        """Write a state, unless one for that step exists, and remove the oldest earlier ones.

        Raises:
            StorageError: If the disk cannot be written; earlier states are untouched.
        """
        if state.step == self._saved:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The folder for training states cannot be created: {error}.") from error
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        tensors[_LOSSES] = torch.tensor(state.losses, dtype=torch.float64)
        about = {
            "version": STATE_VERSION,
            "identity": dict(self._identity.parts),
            "step": state.step,
            "numbers": state.numbers,
        }
        if state.planned is not None:
            about["planned"] = state.planned
        about["checksum"] = _checksum(about, tensors)
        metadata = {"format": "pt", "blockskip": json.dumps(about)}
        write_atomically(
            self._folder / f"state-{state.step:08d}.safetensors", lambda p: save_file(tensors, p, metadata)
        )
        self._saved = state.step
        earlier = [
            path for path in self._states() if step_of_state(path) <= state.step
        ]  # later ones are a longer run's
        for path in earlier[self._keep :]:
            self._remove(path)

    def newest(self, max_step: int) -> TrainingState | None:
        """Return the newest state up to a step, to resume from, or None.

        A damaged state is removed, with a warning, and the previous one is used.

        Raises:
            CheckpointError: If a state belongs to another run.
            StorageError: If a state cannot be read; it is kept, because it may be intact.
        """
        for path in self._states() if self.resume else ():
            if step_of_state(path) > max_step:
                continue
            try:
                state = self._read(path)
            except _DamagedError as error:
                logger.warning("BlockSkip: removing the damaged training state %s (%s)", path.name, error)
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
            found = [path for path in self._folder.iterdir() if is_training_state(path)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"The folder of training states cannot be read: {error}. {_LATER}") from error
        return sorted(found, key=step_of_state, reverse=True)

    def _read(self, path: Path) -> TrainingState:
        try:
            with open_tensors(path) as file:
                about = json.loads((file.metadata() or {})["blockskip"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if about.pop("checksum") != _checksum(about, tensors) or about["version"] != STATE_VERSION:
                raise _DamagedError("its checksum or version does not match")
            losses = tensors.pop(_LOSSES).tolist()
            differing = self._identity.difference(about["identity"])
            numbers = dict(about["numbers"])
            state = TrainingState(int(about["step"]), losses, tensors, numbers, about.get("planned"))
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


def remove_old_runs(parent: Path, *, keep: int, exclude: str) -> list[str]:
    """Remove folders of old runs below ``parent``, except the newest: ``keep`` unfinished ones and ``keep`` finished ones.

    What a process is training is neither removed nor counted. A state that does not say how many steps were planned counts
    as unfinished.

    Args:
        parent: The folder of all runs' folders.
        keep: How many of each kind to keep.
        exclude: Name of a folder that is always kept and not counted.

    Returns:
        A sentence for each run that was removed unfinished; they are logged too.
    """
    told: list[str] = []
    if not parent.is_dir():
        return told
    found: Counter[bool] = Counter()
    try:
        runs = [path for path in parent.iterdir() if path.name != exclude and _is_run(path)]
        for path in sorted(runs, key=lambda path: -path.stat().st_mtime):
            held = try_lock(path)
            if held is None:
                continue
            with held:
                step, planned = _progress_of(path)
                unfinished = planned is None or step < planned
                found[unfinished] += 1
                if found[unfinished] <= keep:
                    continue
                logger.info("BlockSkip: removing the states of the old run %s", path.name)
                if planned is not None and unfinished:
                    told.append(_on_unfinished(path, step, planned, keep))
                shutil.rmtree(path, ignore_errors=True)
        remove_stale_locks(parent)
    except (OSError, StorageError) as error:  # another program may be removing them too
        logger.warning("BlockSkip: cannot remove the states of old runs: %s", error)
    return told


def _on_unfinished(folder: Path, step: int, planned: int, keep: int) -> str:
    """Return a sentence on an unfinished run that is being removed, and log it."""
    saved = time.strftime("%Y-%m-%d at %H:%M", time.localtime(folder.stat().st_mtime))
    said = (
        f"The training state of an unfinished run was removed: step {step} of {planned}, saved on {saved}. Besides the "
        f"present run, only the {keep} newest unfinished ones are kept. If it is started again, it begins at its first step."
    )
    logger.warning("BlockSkip: %s", said)
    return said


def _progress_of(folder: Path) -> tuple[int, int | None]:
    """Return how many steps a run has made, and how many were planned: None if its newest state does not say it.

    A run without a state has nothing to continue from, so it counts as finished.
    """
    newest = max(folder.glob("state-*.safetensors"), key=step_of_state, default=None)
    if newest is None:
        return 0, 0
    planned = about_state(newest).get("planned")  # none if damaged, or not readable now: it may be worth continuing
    return step_of_state(newest), planned if isinstance(planned, int) else None


def about_state(path: Path) -> dict[str, Any]:
    """Return what a training state says of itself, without its tensors, or nothing if it cannot be read."""
    try:
        with open_tensors(path) as file:
            about = json.loads((file.metadata() or {})["blockskip"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        logger.info("BlockSkip: the training state %s cannot be read: %s", path.name, error)
        return {}
    return about if isinstance(about, dict) else {}


def _is_run(folder: Path) -> bool:
    return any(folder.glob("state-*.safetensors")) or (folder / SAMPLES_FILE).is_file()


def is_training_state(path: Path) -> bool:
    """Return whether a file has the name of a training state."""
    return step_of_state(path) >= 0


def step_of_state(path: Path) -> int:
    """Return the step of the training state with a path, or -1 if it is another file."""
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

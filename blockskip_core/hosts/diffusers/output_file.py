"""The file that a run's LoRA is saved to, found before the run and kept free for it."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from ...errors import InvalidInputError, StorageError
from ...files import unique_token, what_helps
from ...locks import Lock, remove_stale_locks, try_lock


class OutputFile:
    """The next numbered file of a name, reserved against other runs until the ``with`` block ends.

    Attributes:
        path: The file, which does not exist yet.

    Args:
        folder: The output folder.
        name: The file's name below it, without ending, with "/" between folders; of parts that all systems accept.

    Raises:
        InvalidInputError: If a link leads out of the output folder.
        StorageError: If the file could not be written there.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._stem = folder.joinpath(*name.split("/"))
        there = self._stem.parent.resolve()
        if not there.is_relative_to(folder.resolve()):
            raise InvalidInputError(
                f"{self._stem.parent} leads to {there}, outside {folder}, and nothing is written there. Choose another "
                "output_name, or another --output."
            )
        self._lock: Lock | None = None
        self.path = self.renew()
        _require_writable(self.path)

    def renew(self) -> Path:
        """Return the path, or the next one if another program has created that file in the meantime."""
        if self._lock is None or os.path.lexists(self.path):
            self.release()
            self.path, self._lock = self._next()
        return self.path

    def _next(self) -> tuple[Path, Lock]:
        for number in count(1):
            path = self._stem.with_name(f"{self._stem.name}_{number:05}.safetensors")
            held = None if os.path.lexists(path) else try_lock(path)
            if held is not None and not os.path.lexists(path):
                return path, held
            if held is not None:  # written between the two looks
                held.release()
        raise AssertionError("there is always a next number")

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Free the name for others."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _require_writable(path: Path) -> None:
    """Write an empty file beside the path and remove it; remove what killed runs have left locked.

    Raises:
        StorageError: If that fails.
    """
    remove_stale_locks(path.parent, f"{path.stem.rpartition('_')[0]}_*.safetensors")
    trial = path.with_name(f"{path.name}.{unique_token()}.trial")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise StorageError(f"{path.name} cannot be written: {error}. {what_helps(error)}") from error

"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import StorageError

logger = logging.getLogger(__name__)

_WAITS_S = (0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()
LEFTOVER_AGE_S = 60.0  # a younger temporary file may be another program's that is writing just now


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and give it its name.

    A folder that is not there is made.

    Raises:
        StorageError: If the disk refuses; the temporary file is removed, an earlier ``path`` is untouched.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path.name} could not be written: {error}. {_what_helps(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # what cannot be written (a name too long, say) cannot be removed either
            temporary.unlink()


def _replace(temporary: Path, path: Path) -> None:
    """Give a file its name. Windows refuses while another program reads the old one (a virus scanner, say): wait a little."""
    for seconds in _WAITS_S:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(temporary, path)


def _what_helps(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "Close the program that has it open, or allow ComfyUI to write there, and try again."
    return "Free some disk space and try again."


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, for a ``with`` block or to be kept.

    Raises:
        FileNotFoundError: If it is not there; only then, whereas safetensors says so of every file that cannot be opened.
        OSError: If the system refuses, say because too many files are open.
        SafetensorError: If it is no such file, or damaged.
    """
    with open(path, "rb"):
        return safe_open(path, framework="pt")


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove temporary files that a killed process has left.

    Args:
        folder: Where to look.
        is_ours: Name of a file -> whether it is a temporary file that may go.
    """
    try:
        for path in [path for path in folder.iterdir() if is_ours(path.name)]:
            if time.time() - path.stat().st_mtime >= LEFTOVER_AGE_S:
                logger.info("BlockSkip: removing %s, which a run left that was killed", path.name)
                path.unlink()
    except OSError as error:  # in nobody's way
        logger.warning("BlockSkip: files that a killed run left cannot be removed: %s", error)

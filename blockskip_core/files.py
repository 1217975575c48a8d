"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import StorageError

logger = logging.getLogger(__name__)

_WAITS_S = (0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()
TEMPORARY = (".part", ".trial")
"""Endings of temporary files."""
LEFTOVER_AGE_S = 60.0  # a younger temporary file may be another program's that is writing just now


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it.

    A missing folder is created. No two writers have the same temporary file, in whatever processes they are.

    Raises:
        StorageError: If the disk refuses; the temporary file is removed, an earlier ``path`` is untouched.
    """
    temporary = path.with_name(f"{path.name}.{unique_token()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path.name} could not be written: {error}. {what_helps(error)}") from error
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


_REMEDIES = {
    errno.EACCES: "Close the program that has it open, or allow ComfyUI to write there, and try again.",
    errno.EROFS: "That disk can only be read: choose another output folder.",
    errno.ENOENT: "Its folder was removed or renamed meanwhile; try again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOSPC: "Free some disk space and try again.",
}
_REMEDIES[errno.EPERM] = _REMEDIES[errno.EACCES]
_REMEDIES[errno.EFBIG] = _REMEDIES[errno.ENOSPC]
_REMEDIES[getattr(errno, "EDQUOT", errno.ENOSPC)] = _REMEDIES[errno.ENOSPC]
_WINDOWS_CODES = {3: errno.ENOENT, 5: errno.EACCES, 32: errno.EACCES, 39: errno.ENOSPC, 112: errno.ENOSPC}


def what_helps(error: Exception) -> str:
    """Return a sentence that says what to do about a disk that refuses to write."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"os error (\d+)", str(error))):  # as safetensors hands them on
        number = _WINDOWS_CODES.get(int(said[1]), int(said[1])) if os.name == "nt" else int(said[1])
    return _REMEDIES.get(number, "Look whether the disk is full or damaged, and try again.")


def unique_token() -> str:
    """Return a part of a name that no other process has, eight hexadecimal digits."""
    return secrets.token_hex(4)


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, for a ``with`` block or to be kept.

    Raises:
        FileNotFoundError: If it is not there; only then, whereas safetensors says so of every file that cannot be opened.
        OSError: If the system refuses, say because too many files are open.
        SafetensorError: If it is not such a file, or damaged.
    """
    with open(path, "rb"):
        return safe_open(path, framework="pt")


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool], *, min_age_s: float = LEFTOVER_AGE_S) -> None:
    """Remove temporary files that a killed process has left.

    Args:
        folder: Where to look.
        is_ours: Name of a file -> whether it is a temporary file that may go.
        min_age_s: Younger files stay; 0 where a lock says that nobody else writes.
    """
    try:
        for path in [path for path in folder.iterdir() if path.name.endswith(TEMPORARY) and is_ours(path.name)]:
            if time.time() - path.stat().st_mtime >= min_age_s:
                logger.info("BlockSkip: removing %s, which a run left that was killed", path.name)
                path.unlink()
    except FileNotFoundError:  # the folder, or another process was faster
        return
    except OSError as error:  # it does no harm
        logger.warning("BlockSkip: files that a killed run left cannot be removed: %s", error)

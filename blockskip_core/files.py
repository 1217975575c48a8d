"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
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
LEFTOVER_AGE_S = 60.0  # a younger temporary file may belong to another program that is writing it now


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it.

    A missing folder is created. No two writers use the same temporary file, even in different processes.

    Raises:
        StorageError: If writing fails; the temporary file is removed, an existing ``path`` is unchanged.
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
        with contextlib.suppress(OSError):  # if it cannot be written (name too long, say), there is nothing to remove
            temporary.unlink()


def _replace(temporary: Path, path: Path) -> None:
    """Rename a file; on Windows wait a little while another program (a virus scanner, say) still reads the old one."""
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
    """Return a sentence that says what to do about a failed write."""
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    if not number and (said := re.search(r"os error (\d+)", str(error))):  # the form in which safetensors reports them
        number = int(said[1])
        number = _WINDOWS_CODES.get(number, number) if os.name == "nt" else number
    return _REMEDIES.get(number, "Look whether the disk is full or damaged, and try again.")


def unique_token() -> str:
    """Return eight hexadecimal digits for a name that no other process uses."""
    return secrets.token_hex(4)


def content_hash(path: Path) -> str:
    """Return the content hash of a file, 32 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file, for a ``with`` block or to be kept.

    Raises:
        FileNotFoundError: If the file does not exist; safetensors raises it for every file that cannot be opened.
        OSError: If the system cannot open it, for example because too many files are open.
        SafetensorError: If it is not a safetensors file, or damaged.
    """
    with open(path, "rb"):
        return safe_open(path, framework="pt")


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool], *, min_age_s: float = LEFTOVER_AGE_S) -> None:
    """Remove temporary files left by a killed process.

    Args:
        folder: Where to look.
        is_ours: Name of a file -> whether it is a temporary file that may be removed.
        min_age_s: Younger files are kept; 0 where a lock guarantees that nobody else is writing.
    """
    try:
        for path in [path for path in folder.iterdir() if path.name.endswith(TEMPORARY) and is_ours(path.name)]:
            if time.time() - path.stat().st_mtime >= min_age_s:
                logger.info("BlockSkip: removing %s, left by a killed run", path.name)
                path.unlink()
    except FileNotFoundError:  # no such folder, or another process was faster
        return
    except OSError as error:  # leftovers do no harm
        logger.warning("BlockSkip: cannot remove files left by a killed run: %s", error)

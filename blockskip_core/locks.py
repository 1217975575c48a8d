"""Locks between processes: two ComfyUIs may share an output folder, on one machine, in containers or over a network.

A lock on a file or folder is the operating system's lock on an empty file beside it. The system frees it when the
process that holds it ends, however it ends. So no lock is ever stale, and we need not rely on process numbers (which
are reused, and mean nothing in another container or on another machine). The locked file or folder need not exist yet.

A lock is shared (any number of readers) or exclusive (one process that writes or removes). The file locks of
``filelock``, which comes with ComfyUI, are never shared, and on disks without locks some of its versions use marker
files with process numbers instead.

On a disk without locks (some network drives) everything works as if there were no other process, after one warning.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from .errors import StorageError
from .files import what_helps

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 0.25
_SUFFIX = ".lock"
_HELD_BY_OTHERS = {errno.EACCES, errno.EAGAIN, errno.EDEADLK, errno.EWOULDBLOCK}
_WINDOWS = sys.platform == "win32"
_REOPEN_WAITS_S = (0.1, 0.2, 0.4) if _WINDOWS else ()
_MOST_REOPENINGS = 20  # on some drives the same file never compares equal

if sys.platform == "win32":
    import msvcrt

    _READERS = 64  # most readers of a file at a time

    def _lock_descriptor(descriptor: int, shared: bool) -> None:
        """Lock an open file. Python has no shared lock on Windows, so a reader locks one byte and a writer all of them.

        Raises:
            OSError: If others hold it, or the disk has no locks.
        """
        if not shared:
            return _lock_bytes(descriptor, 0, _READERS)
        for byte in range(_READERS):
            try:
                return _lock_bytes(descriptor, byte, 1)
            except OSError as error:
                if error.errno not in _HELD_BY_OTHERS or byte == _READERS - 1:
                    raise
        return None

    def _lock_bytes(descriptor: int, start: int, count: int) -> None:
        os.lseek(descriptor, start, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, count)  # the bytes need not exist

else:
    import fcntl

    def _lock_descriptor(descriptor: int, shared: bool) -> None:
        """Lock an open file, or change the lock on it.

        Raises:
            OSError: If others hold it, or the disk has no locks.
        """
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


class Lock:
    """A lock that is held until :meth:`release`, the end of a ``with`` block, or the end of this process.

    A forked child does not have it.
    """

    def __init__(self, path: Path, descriptor: int, shared: bool) -> None:
        self._descriptor = descriptor
        self._end = weakref.finalize(self, _release, path, descriptor, shared)
        _held.add(self)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock; calling it again does nothing."""
        self._end()

    def leave_to_parent(self) -> None:
        """Forget the lock in a forked child, whose copy of the descriptor would keep it after the parent has ended."""
        if self._end.detach():
            os.close(self._descriptor)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for lock in list(_held):
        lock.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


def try_lock(target: Path, *, shared: bool = False) -> Lock | None:
    """Return a lock on a file or folder, or None if another process (or this one) holds a conflicting one.

    Raises:
        StorageError: If the disk cannot be written.
    """
    path = target.with_name(target.name + _SUFFIX)
    for number in range(_MOST_REOPENINGS):
        try:
            descriptor = _opened(path)
        except OSError as error:
            raise StorageError(f"{path.name} could not be created: {error}. {what_helps(error)}") from error
        held = None
        try:
            if not _is_locked_now(descriptor, shared, path):
                return None
            # The previous holder may have removed the file in the meantime; then this lock protects nothing.
            if _is_still_there(descriptor, path) or number == _MOST_REOPENINGS - 1:
                held = Lock(path, descriptor, shared)
                return held
        finally:
            if held is None:
                os.close(descriptor)
    raise AssertionError("the last reopening returns")


def lock(target: Path, waiting: Callable[[], object], *, shared: bool = False) -> Lock:
    """Return a lock on a file or folder, waiting until it is available.

    Args:
        target: The file or folder to lock; the lock is a file beside it.
        waiting: Called repeatedly while others hold it; may raise to give up.
        shared: Whether others may hold a shared lock at the same time.

    Raises:
        StorageError: If the disk cannot be written.
    """
    while (held := try_lock(target, shared=shared)) is None:
        waiting()
        time.sleep(SECONDS_BETWEEN_TRIES)
    return held


def remove_stale_locks(folder: Path, pattern: str = "*") -> None:
    """Remove lock files left by killed processes in a folder, if their targets no longer exist."""
    try:
        for path in list(folder.glob(pattern + _SUFFIX)):
            target = path.with_name(path.name.removesuffix(_SUFFIX))
            if not os.path.lexists(target) and (held := try_lock(target)):
                held.release()
    except (OSError, StorageError) as error:  # they do no harm
        logger.warning("BlockSkip: cannot remove lock files left by a killed process: %s", error)


def _opened(path: Path) -> int:
    """Open a lock file. Windows refuses for a moment while a file of that name is being removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for seconds in _REOPEN_WAITS_S:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            time.sleep(seconds)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _is_locked_now(descriptor: int, shared: bool, path: Path) -> bool:
    try:
        _lock_descriptor(descriptor, shared)
    except OSError as error:
        if error.errno in _HELD_BY_OTHERS:
            return False
        _warn_once(path.parent, str(error))
    return True


_warned: set[str] = set()


def _warn_once(folder: Path, reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        logger.warning(
            "BlockSkip: the disk of %s has no file locks (%s). Do not let two processes use it.",
            folder,
            reason,
        )


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int, shared: bool) -> None:
    """Release a lock, and remove its file if nobody else has a lock on it.

    The file is removed while it is locked, so that nobody else can hold it. On Windows it is closed first, because
    Windows removes no file that is open.
    """
    try:
        if not _WINDOWS:
            if shared:
                _lock_descriptor(descriptor, shared=False)
            _remove(path)
    except OSError as error:  # it has other readers
        logger.debug("BlockSkip: %s stays: %s", path.name, error)
    finally:
        os.close(descriptor)
    if _WINDOWS:
        try:
            _remove(path)
        except OSError as error:
            logger.debug("BlockSkip: %s stays: %s", path.name, error)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)

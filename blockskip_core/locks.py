"""Locks between processes: two ComfyUIs may have one output folder, on one machine, in containers or over a network.

A lock on a file or folder is the operating system's lock on an empty file beside it. The system frees it when the process
that holds it ends, however it ends; so no lock is ever stale, and no process number has to be trusted (numbers are used
again, and mean nothing in another container or on another machine). What is locked need not be there yet.

A lock is shared (any number of readers) or not (one writer, or one who removes). The file locks of ``filelock``, which
ComfyUI brings, are never shared, and some of its versions put marker files with process numbers in their place on disks
that have no locks.

On a disk that has no locks (some network drives) everything works as if no other process were there, after one warning.
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
_MOST_REOPENINGS = 20  # there are drives on which no file is the same twice

if sys.platform == "win32":
    import msvcrt

    _READERS = 64  # that a file can have at a time

    def _lock_descriptor(descriptor: int, shared: bool) -> None:
        """Lock an open file. A reader locks one of its bytes, a writer all of them: Python has no shared lock here.

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
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, count)  # they need not be there

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
        """Let others have it; more than once does nothing."""
        self._end()

    def leave_to_parent(self) -> None:
        """Forget the lock in a forked child. Its copy of the descriptor would keep the lock when the parent has ended."""
        if self._end.detach():
            os.close(self._descriptor)


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for lock in list(_held):
        lock.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


def try_lock(target: Path, *, shared: bool = False) -> Lock | None:
    """Return a lock on a file or folder, or None if another process (or this one) holds one that does not go with it.

    Raises:
        StorageError: If the disk refuses.
    """
    path = target.with_name(target.name + _SUFFIX)
    for number in range(_MOST_REOPENINGS):
        try:
            descriptor = _opened(path)
        except OSError as error:
            raise StorageError(f"{path.name} could not be made: {error}. {what_helps(error)}") from error
        held = None
        try:
            if not _is_locked_now(descriptor, shared, path):
                return None
            # Who held it before may have removed the file meanwhile; then this lock keeps nobody out.
            if _is_still_there(descriptor, path) or number == _MOST_REOPENINGS - 1:
                held = Lock(path, descriptor, shared)
                return held
        finally:
            if held is None:
                os.close(descriptor)
    raise AssertionError("the last reopening returns")


def lock(target: Path, waiting: Callable[[], object], *, shared: bool = False) -> Lock:
    """Return a lock on a file or folder, as soon as it is to be had.

    Args:
        target: What is locked; the lock is a file beside it.
        waiting: Called again and again while others hold it; may raise to give up.
        shared: Whether others may have a shared lock at the same time.

    Raises:
        StorageError: If the disk refuses.
    """
    while (held := try_lock(target, shared=shared)) is None:
        waiting()
        time.sleep(SECONDS_BETWEEN_TRIES)
    return held


def remove_stale_locks(folder: Path, pattern: str = "*") -> None:
    """Remove the lock files that killed processes have left in a folder, of targets that are not there any more."""
    try:
        for path in list(folder.glob(pattern + _SUFFIX)):
            target = path.with_name(path.name.removesuffix(_SUFFIX))
            if not os.path.lexists(target) and (held := try_lock(target)):
                held.release()
    except (OSError, StorageError) as error:  # in nobody's way
        logger.warning("BlockSkip: lock files that a killed process left cannot be removed: %s", error)


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
    """Let go of a lock, and remove its file if nobody else has a lock on it.

    The file is removed while it is locked, so that nobody else can hold it. Windows is the other way round: it removes no
    file that anybody has open.
    """
    try:
        if not _WINDOWS:
            if shared:
                _lock_descriptor(descriptor, shared=False)
            _remove(path)
    except OSError as error:  # others read
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

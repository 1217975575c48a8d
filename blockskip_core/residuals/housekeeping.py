"""Removing residuals that no process uses: old caches, damaged ones, and chunks of runs that were killed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CacheError, StorageError
from ..files import unique_token
from ..locks import lock, remove_stale_locks, try_lock
from .cache import UNFINISHED, is_finished, remove_cache

logger = logging.getLogger(__name__)

KEPT_CACHES = 3  # how many of the newest finished caches to keep on disk
_SCRATCH = re.compile(r".*-chunk-[0-9a-f]{8}")  # one chunk of one run


def remove_old_caches(parent: Path, *, keep: int, exclude: str = "") -> None:
    """Remove old caches below ``parent`` that no process uses, except the ``keep`` newest; nothing else is removed.

    ``exclude`` is the name of a cache that is always kept and not counted.
    """
    if not parent.is_dir():
        return
    try:
        own = [path for path in parent.iterdir() if is_finished(path) or (path / UNFINISHED).is_file()]
        own = [path for path in own if path.name != exclude and not _SCRATCH.fullmatch(path.name)]
        caches = sorted(own, key=lambda path: -path.stat().st_mtime)
    except OSError as error:  # another program may be removing them too
        logger.warning("BlockSkip: cannot remove old residuals: %s", error)
        return
    for path in caches[keep:]:
        if remove_unused(path):
            logger.info("BlockSkip: removed the old residuals %s", path.name)
    remove_stale_locks(parent)


def remove_unused(folder: Path) -> bool:
    """Remove a cache unless a process uses it; return whether it was removed."""
    try:
        held = try_lock(folder)
    except StorageError as error:
        logger.warning("BlockSkip: %s", error)
        return False
    if held is None:
        return False
    with held:
        remove_cache(folder)
    return True


@contextmanager
def removed_if_damaged(remove: Callable[[], bool]) -> Iterator[None]:
    """Remove a cache that proves damaged, so that the next run computes it again, and say so in the error."""
    try:
        yield
    except CacheError as error:
        done = "They have been removed; run again to compute them."
        if not remove():
            done = "Another process still uses them: wait until it ends, and run again."
        raise CacheError(f"{error} {done}") from error


@contextmanager
def scratch_folder(base: Path) -> Iterator[Path]:
    """Provide a folder that no other run uses, and remove it at the end; also remove those of killed runs."""
    folder = base.with_name(f"{base.name}-chunk-{unique_token()}")
    with lock(folder, lambda: None):
        _remove_abandoned(folder.parent)
        try:
            yield folder
        finally:
            remove_cache(folder)


def _remove_abandoned(parent: Path) -> None:
    try:
        folders = [path for path in parent.iterdir() if _SCRATCH.fullmatch(path.name)]
    except OSError as error:
        logger.warning("BlockSkip: cannot remove residuals of a killed run: %s", error)
        return
    for path in folders:
        remove_unused(path)

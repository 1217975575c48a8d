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
_PART = re.compile(r"(?P<whole>.*)-part-\d{1,6}")  # what one of several processes computes of a cache
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
        parts = {path: found["whole"] for path in own if (found := _PART.fullmatch(path.name))}
        caches = sorted((path for path in own if path not in parts), key=lambda path: -path.stat().st_mtime)
    except OSError as error:  # another program may be removing them too
        logger.warning("BlockSkip: cannot remove old residuals: %s", error)
        return
    kept = {exclude, *(path.name for path in caches[:keep])}
    for path in [*caches[keep:], *(path for path, whole in parts.items() if whole not in kept)]:
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


def part_folder(folder: Path, rank: int) -> Path:
    """Return the folder of what one of several processes computes of a cache."""
    return folder.with_name(f"{folder.name}-part-{rank}")


def parts_of(folder: Path) -> list[Path]:
    """Return the folders of all parts of a cache."""
    found = folder.parent.glob(f"{folder.name}-part-*")
    return sorted(path for path in found if path.is_dir() and _PART.fullmatch(path.name))


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

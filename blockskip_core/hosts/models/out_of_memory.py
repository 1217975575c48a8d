"""Explain out-of-memory errors in one sentence, after releasing the memory that the failed step held."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from ...errors import BlockSkipError

logger = logging.getLogger(__name__)


class OutOfMemoryError(BlockSkipError, comfy.model_management.OOM_EXCEPTION):
    """A run needs more memory than the device has. Also one of the host's errors, so that it unloads all models."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error comes from an allocator, of any device, and has not been explained yet."""
    if isinstance(error, BlockSkipError):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    return said or comfy.model_management.is_oom(error)


_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # MPS; the CPU's allocator, on Windows


def log_and_release(error: BaseException) -> str:
    """Log an error, clear the frames of its traceback, and return the first line of its message.

    Those frames hold the activations of the failed step, which fill the device as long as anything refers to the error.
    """
    logger.warning("BlockSkip: out of memory", exc_info=error)
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


@contextmanager
def out_of_memory_explained(doing: str, advice: str) -> Iterator[None]:
    """Turn an allocator's error in this context into one sentence.

    Args:
        doing: The activity, e.g. "Precomputing".
        advice: A sentence that says what to change.

    Raises:
        OutOfMemoryError: In place of the allocator's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = log_and_release(error)
    else:
        return
    raise OutOfMemoryError(f"{doing} ran out of memory ({said}). {advice}")

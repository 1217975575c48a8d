"""Out-of-memory errors: explained in one sentence, after releasing what filled the memory."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

from ...errors import BlockSkipError

logger = logging.getLogger(__name__)


class OutOfMemoryError(BlockSkipError, comfy.model_management.OOM_EXCEPTION):
    """A run that needs more memory than the device has. The host knows it as one of its own, and unloads all models."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is an allocator's, of whatever device, that has not been explained yet."""
    if isinstance(error, BlockSkipError):
        return False
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    return said or comfy.model_management.is_oom(error)


_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # MPS; the CPU's allocator, on Windows


def let_go(error: BaseException) -> str:
    """Log an error, drop what the frames of its traceback hold, and return the first line of what it says.

    The activations of the step that failed are among these: as long as anything holds the error, they fill the device.
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
        doing: What is done, e.g. "Precomputing".
        advice: What to change, a sentence.

    Raises:
        OutOfMemoryError: In place of the allocator's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = let_go(error)
    else:
        return
    raise OutOfMemoryError(f"{doing} ran out of memory ({said}). {advice}")

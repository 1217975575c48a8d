"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import StorageError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and give it its name.

    Raises:
        StorageError: If the disk refuses; the temporary file is removed, an earlier ``path`` is untouched.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path.name} could not be written: {error}. Free some disk space and try again.") from error
    finally:
        temporary.unlink(missing_ok=True)

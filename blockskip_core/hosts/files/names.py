"""File names typed by users: the same rules on all systems, so that a workflow saves to the same place everywhere.

Both "/" and "\\" separate folders. Names that Windows forbids or changes are refused everywhere, with a message that
says what to type instead; see ``names`` of the core.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ...errors import InvalidInputError
from ...names import fault_of, repaired


def name_below(text: str, example: str) -> PurePosixPath:
    """Return the typed name as a relative path that means the same below any folder on any system.

    Args:
        text: A name, with or without folders.
        example: A valid name, for messages.

    Raises:
        InvalidInputError: If some system would refuse the name, change it, or resolve it elsewhere.
    """
    if not text.isprintable():
        raise InvalidInputError(
            f"The file name must not contain control characters. Use a plain name such as {example}."
        )
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".")]
    if text[:1] in ("/", "\\") or ".." in parts or re.match(r"[A-Za-z]:", text):
        raise InvalidInputError(
            f"The file name {text!r} must stay inside ComfyUI's output folder: no drive, no .. and no leading /. Use a "
            f"plain name such as {example}."
        )
    if not parts:
        raise InvalidInputError(f"The file name {text!r} names no file. Use a plain name such as {example}.")
    for part in parts:
        if fault := fault_of(part):
            raise InvalidInputError(f"The file name {text!r} {fault}. Use a name such as {repaired(parts)}.")
    return PurePosixPath(*parts)

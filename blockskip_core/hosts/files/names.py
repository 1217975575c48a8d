"""File names typed by users: the same rules on all systems, so that a workflow saves to the same place everywhere.

Both "/" and "\\" separate folders. Names that Windows forbids or changes (device names, drives, a trailing space or
dot) are refused everywhere, with a message that says what to type instead.

Source of the rules: Microsoft, "Naming Files, Paths, and Namespaces".
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ...errors import InvalidInputError

_RESERVED_CHARACTERS = '<>:"|?*'
_RESERVED_NAMES = frozenset(
    [
        "con",
        "prn",
        "aux",
        "nul",
        "conin$",
        "conout$",
        *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³"),
    ]
)


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
        if fault := _fault(part):
            raise InvalidInputError(f"The file name {text!r} {fault}. Use a name such as {_repaired(parts)}.")
    return PurePosixPath(*parts)


def _fault(part: str) -> str:
    found = sorted(set(part) & set(_RESERVED_CHARACTERS))
    if found:
        return f"has {' '.join(found)} in it, which not every system allows in a name"
    if part != part.strip(" ") or part.endswith("."):
        return f"has a part {part!r} that begins or ends with a space or ends with a dot, which Windows removes"
    if _is_reserved(part):
        return f"has a part {part!r}, which is the name of a device on Windows"
    return ""


def _is_reserved(part: str) -> bool:
    return part.partition(".")[0].rstrip(" ").lower() in _RESERVED_NAMES


def _repaired(parts: list[str]) -> str:
    """Return a similar name that every system accepts."""
    cleaned = ["".join("_" if char in _RESERVED_CHARACTERS else char for char in part) for part in parts]
    trimmed = [part.lstrip(" ").rstrip(" .") or "_" for part in cleaned]
    return "/".join(f"_{part}" if _is_reserved(part) else part for part in trimmed)

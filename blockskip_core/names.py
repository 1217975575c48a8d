"""Names of files and folders that mean the same on all systems.

Names that Windows forbids or changes (device names, drives, a trailing space or dot) are faulty everywhere.

Source of the rules: Microsoft, "Naming Files, Paths, and Namespaces".
"""

from __future__ import annotations

from collections.abc import Sequence

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


def fault_of(part: str) -> str:
    """Return why some system would refuse or change a part of a path, to follow the name in a sentence; empty if none."""
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


def repaired(parts: Sequence[str]) -> str:
    """Return a similar name that every system accepts."""
    cleaned = ["".join("_" if char in _RESERVED_CHARACTERS else char for char in part) for part in parts]
    trimmed = [part.lstrip(" ").rstrip(" .") or "_" for part in cleaned]
    return "/".join(f"_{part}" if _is_reserved(part) else part for part in trimmed)

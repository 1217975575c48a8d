"""Numbers in readable units."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Return a readable byte count, e.g. "7.38 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024.0:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024.0
    return f"{count:.2f} GiB"

"""Helpers for nodes that take lists: every input of such a node, widgets included, arrives as a list."""

from __future__ import annotations

from typing import Any

from ..blockskip_core.errors import InvalidInputError
from ..blockskip_core.memory_plan import MemorySettings


def single(value: Any, name: str = "") -> Any:
    """Return the only element of a list input; an unconnected optional (None) stays None.

    Raises:
        InvalidInputError: If the list holds several different things where one is expected.
    """
    if not isinstance(value, list):
        return value
    if not value:
        raise InvalidInputError(f"Nothing came in for `{name}`. Connect one value.")
    if len(value) > 1 and any(other is not value[0] and not _equal(other, value[0]) for other in value[1:]):
        raise InvalidInputError(f"`{name}` takes one value, got a list of {len(value)}. Connect a node that gives one.")
    return value[0]


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, (str, int, float, bool)) and a == b


def singles(**values: Any) -> dict[str, Any]:
    """Return the only element of each list input, by name."""
    return {name: single(value, name) for name, value in values.items()}


def require_memory_settings(value: Any) -> None:
    """Raise InvalidInputError unless this is what Memory Plan gives."""
    if not isinstance(value, MemorySettings):
        raise InvalidInputError(
            f"memory_settings must come from Memory Plan's output `settings`, got a {type(value).__name__}."
        )

"""Dataclasses from JSON that anybody may have written: every value has the type that its field declares."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InvalidInputError

T = TypeVar("T")


def from_json(kind: type[T], content: Any, place: str, without: Collection[str] = (), **more: Any) -> T:
    """Return a dataclass with the values of a JSON object.

    Args:
        kind: The dataclass; its own checks apply too.
        content: The parsed object.
        place: What it is, for messages.
        without: Fields that the object must not have.
        more: Values of some of these fields.

    Raises:
        InvalidInputError: If it is not an object, a name is unknown or missing, or a value has another type.
    """
    if not isinstance(content, Mapping):
        raise InvalidInputError(f"{place} must be a JSON object, got a {type(content).__name__}.")
    hints = get_type_hints(kind)
    declared = {each.name: each for each in fields(kind) if each.init and each.name not in without}  # type: ignore[arg-type]
    unknown = sorted(content.keys() - declared.keys())
    if unknown:
        raise InvalidInputError(f"{place} has {', '.join(unknown)}, which this version does not know. Remove it.")
    values = dict(more)
    for name, each in declared.items():
        if name in content:
            values[name] = _typed(content[name], hints[name], f"{name} in {place}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise InvalidInputError(f"{place} has no {name}. Write the run file again.")
    return kind(**values)


def _typed(value: Any, hint: Any, place: str) -> Any:
    """Return a value in the declared type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (each for each in get_args(hint) if each is not type(None))
        return _typed(value, hint, place)
    if origin is Literal:
        if value not in get_args(hint):
            raise InvalidInputError(f"{place} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}.")
        return value
    if origin is not None:  # a sequence: tuple[int, ...], Sequence[str]
        item = get_args(hint)[0]
        if not isinstance(value, list):
            raise InvalidInputError(f"{place} must be a list, got a {type(value).__name__}.")
        return tuple(_typed(each, item, place) for each in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InvalidInputError(f"{place} must be a {hint.__name__}, got {value!r}.")
    return value

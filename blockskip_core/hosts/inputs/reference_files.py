"""Finds the reference pictures of a training folder's pictures, in a second folder, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ...errors import InvalidInputError

_NUMBERED = re.compile(r"(.+)_\d{1,9}")


def references_by_name(
    pictures: Sequence[Path], candidates: Sequence[Path], folder: str, shown: Callable[[Path], str]
) -> dict[Path, list[Path]]:
    """Return the references of every picture: those of its name, and those of its name with a number.

    ``cat.png`` has the references ``cat.jpg``, ``cat_1.jpg`` and ``cat_2.jpg``, in this order, unless one of them is
    the name of another picture.

    Args:
        pictures: The pictures' files.
        candidates: The files of the reference folder, in the order of their names.
        folder: The reference folder's name in messages.
        shown: File of a picture -> its name in messages.

    Raises:
        InvalidInputError: If a picture has none, or not as many as the first one.
    """
    owners = {picture.stem.casefold() for picture in pictures}
    named: dict[str, list[Path]] = {}
    for candidate in candidates:
        named.setdefault(_owner(candidate.stem.casefold(), owners), []).append(candidate)
    found = {picture: named.get(picture.stem.casefold(), []) for picture in pictures}
    _require_equal(found, folder, shown)
    return found


def _owner(stem: str, owners: Collection[str]) -> str:
    numbered = _NUMBERED.fullmatch(stem)
    return numbered[1] if numbered and stem not in owners else stem


def _require_equal(found: Mapping[Path, Sequence[Path]], folder: str, shown: Callable[[Path], str]) -> None:
    first, expected = next((picture, len(of_one)) for picture, of_one in found.items())
    for picture, of_one in found.items():
        if not of_one:
            raise InvalidInputError(
                f"{shown(picture)} has no reference: the folder {folder!r} holds no picture named {picture.stem!r}. "
                "Add one, or take the picture out of its folder."
            )
        if len(of_one) != expected:
            raise InvalidInputError(
                f"{shown(picture)} has {len(of_one)} references in the folder {folder!r}, and {shown(first)} has "
                f"{expected}. Give every picture equally many."
            )

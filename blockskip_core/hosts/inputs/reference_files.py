"""Finds the reference pictures of a training folder's pictures, in a second folder, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ...errors import InvalidInputError

REPEATED = re.compile(r"(\d{1,9})_")
"""Prefix of a sub-folder whose pictures count several times, as in kohya's trainers."""
_NUMBERED = re.compile(r"(.+)_\d{1,9}")


def references_by_name(
    pictures: Sequence[Path],
    candidates: Sequence[Path],
    folder: str,
    shown: Callable[[Path], str],
    sub_folder: Callable[[Path], str],
) -> dict[Path, list[Path]]:
    """Return the references of every picture: those of its name, and those of its name with a number.

    ``cat.png`` has the references ``cat.jpg``, ``cat_1.jpg`` and ``cat_2.jpg``, in this order, unless one of them is
    the name of another picture. If pictures of several sub-folders have the same name, a reference in a sub-folder belongs to
    those in the sub-folder of that name, which may have another number of repeats.

    Args:
        pictures: The pictures' files.
        candidates: The files of the reference folder, in the order of their names.
        folder: The reference folder's name in messages.
        shown: File of a picture -> its name in messages.
        sub_folder: File of a picture or reference -> name of the sub-folder that it is in; empty if in none.

    Raises:
        InvalidInputError: If a picture has none, or not as many as the first one, or if it is not clear whose one is.
    """
    owners: dict[str, dict[str, list[Path]]] = {}
    for picture in pictures:
        owners.setdefault(picture.stem.casefold(), {}).setdefault(sub_folder(picture), []).append(picture)
    found: dict[Path, list[Path]] = {picture: [] for picture in pictures}
    for candidate in candidates:
        named = owners.get(_owner(candidate.stem.casefold(), owners), {})
        for picture in _pictures_of(candidate, sub_folder(candidate), named, folder, shown):
            found[picture].append(candidate)
    _require_equal(found, folder, shown)
    return found


def _pictures_of(
    candidate: Path, inside: str, named: Mapping[str, list[Path]], folder: str, shown: Callable[[Path], str]
) -> list[Path]:
    """Return the pictures that a reference belongs to, of those of its name by sub-folder."""
    if len(named) < 2 or not inside:
        return [picture for of_one in named.values() for picture in of_one]
    alike = [inside] if inside in named else [other for other in named if _bare(other) == _bare(inside)]
    if len(alike) == 1:
        return named[alike[0]]
    one, other = (shown(of_one[0]) for of_one in [*named.values()][:2])
    raise InvalidInputError(
        f"{one} and {other} have the same name, so it is not clear whose reference {candidate.name} in {folder!r} is. Put it "
        "into a sub-folder of the same name as the picture's, or give the pictures different names."
    )


def _bare(sub_folder: str) -> str:
    repeats = REPEATED.match(sub_folder)
    return sub_folder[repeats.end() :] if repeats else sub_folder


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

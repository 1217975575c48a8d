"""Remarks on odd pictures and captions, in sentences, before an hour is spent on training with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from ..errors import InvalidInputError

MOST_NAMED = 6
WHY_CAPTIONS = (
    "What a caption does not mention becomes part of the subject, and without any words the LoRA changes every picture."
)
FEWEST_ALIKE = 3
"""Number of different pictures with the same caption that is worth a remark; two may well show the same thing."""


class Labels:
    """The pictures' names in messages: their files, or their numbers from 1.

    Args:
        count: Number of pictures.
        names: Their file names; empty if unknown.
        kind: What they are called.

    Raises:
        InvalidInputError: If there is not one name for each.
    """

    def __init__(self, count: int, names: Sequence[str] = (), kind: str = "Picture") -> None:
        if names and len(names) != count:
            raise InvalidInputError(
                f"`files` describes {len(names)} pictures, and {count} came in. Connect `files` and `images` of the "
                "same Load Training Folder."
            )
        self._count, self._names, self._kind = count, names, kind

    def full(self, index: int) -> str:
        """Return a picture's name for the beginning of a sentence: "Picture 3 of 12 (cat.png)"."""
        return f"{self._kind} {index + 1} of {self._count}" + (f" ({self._names[index]})" if self._names else "")

    def short(self, index: int) -> str:
        """Return a picture's name for a list: "cat.png" or "number 3"."""
        return self._names[index] if self._names else f"number {index + 1}"

    def listed(self, pictures: Sequence[int], details: Sequence[str] = ()) -> str:
        """Return the names of some pictures, each with its detail in brackets, and the number of further ones."""
        names = [self.short(index) for index in pictures]
        if details:
            names = [f"{name} ({detail})" for name, detail in zip(names, details, strict=True)]
        distinct = list(dict.fromkeys(names))  # a picture may count several times
        more = len(distinct) - MOST_NAMED
        return ", ".join(distinct[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

    def counted(self, pictures: Sequence[int]) -> str:
        """Return "1 of 12 pictures is" or "3 of 12 pictures are"."""
        return f"{len(pictures)} of {self._count} {self._kind.lower()}s {'is' if len(pictures) == 1 else 'are'}"


def on_size(sizes: Sequence[tuple[int, int]], trained: Sequence[tuple[int, int]], labels: Labels) -> str | None:
    """Return which pictures are too small for the smallest crop, or None if none is.

    Args:
        sizes: Height and width of each in pixels.
        trained: Height and width of its smallest crop in pixels.
        labels: The pictures' names.
    """
    small = [
        index
        for index, ((height, width), (rows, columns)) in enumerate(zip(sizes, trained, strict=True))
        if height < rows or width < columns
    ]
    if not small:
        return None
    measured = [f"{sizes[index][1]} x {sizes[index][0]} px" for index in small]
    sides = {side for size in trained for side in size}
    if len(sides) == 1:
        (side,) = sides
        return (
            f"{labels.counted(small)} smaller than the patch of {side} px: {labels.listed(small, measured)}. "
            f"Use pictures whose shorter side has at least {side} px, or lower patch_min."
        )
    needed = [
        f"{has}, needs {trained[index][1]} x {trained[index][0]}" for has, index in zip(measured, small, strict=True)
    ]
    return (
        f"{labels.counted(small)} smaller than their smallest crop: {labels.listed(small, needed)}. Use larger pictures, or "
        "lower patch_min."
    )


def on_unused(pictures: int, clips: int, frames: int) -> str | None:
    """Return how many pictures at the ends of films are in no clip, or None if all are."""
    if not pictures:
        return None
    return f"{clips} clips of {frames} pictures; {pictures} pictures at the ends of the films are not used"


def on_unread(names: Sequence[str]) -> str | None:
    """Return which picture files are in a format that is not read, or None if there are none."""
    if not names:
        return None
    listed = Labels(len(names), names).listed(range(len(names)))
    return f"Not read, because of their format: {listed}. Save them as JPEG or PNG."


def on_blank(colours: dict[int, str], labels: Labels) -> str | None:
    """Return which pictures are blank, or None if none is; ``colours`` are those of the blank ones."""
    if not colours:
        return None
    return (
        f"{labels.counted(list(colours))} all of one colour, or almost: "
        f"{labels.listed(list(colours), list(colours.values()))}. 16-bit and transparent files can arrive like this: "
        "save them as 8-bit RGB, or leave them out."
    )


def on_transparent(pictures: Sequence[int], labels: Labels) -> str | None:
    """Return which pictures have transparent parts, or None."""
    if not pictures:
        return None
    return (
        f"{labels.counted(pictures)} partly transparent: {labels.listed(pictures)}. The colours that the transparency "
        "hides are trained on. Put these pictures on a background first."
    )


def on_unedited(pictures: Sequence[int], labels: Labels) -> str | None:
    """Return which pictures are the same as their reference, or None."""
    if not pictures:
        return None
    return (
        f"{labels.counted(pictures)} the same as before the edit: {labels.listed(pictures)}. Is `references` connected "
        "to the pictures before the edit?"
    )


def put_on_white(pictures: Sequence[int], labels: Labels) -> str | None:
    """Return which pictures had transparent parts, now white, or None."""
    if not pictures:
        return None
    return f"{labels.counted(pictures)} partly transparent and shown on white: {labels.listed(pictures)}."


def on_guessed_texts(pictures: Sequence[int], labels: Labels) -> str | None:
    """Return which captions may contain wrong letters, or None; ``pictures`` are those whose encoding is unknown."""
    if not pictures:
        return None
    return (
        f"The captions of {labels.listed(pictures)} are not in UTF-8 and were read as Windows-1252, which is right for "
        "Western languages only. Save them in UTF-8 to be sure."
    )


def on_empty_captions(captions: Sequence[str], labels: Labels) -> str | None:
    """Return which pictures have no caption, or None if all have one; ``captions`` are their texts."""
    empty = [index for index, caption in enumerate(captions) if not caption]
    if not empty:
        return None
    which = (
        f"None of the {len(captions)} pictures has a caption"
        if len(empty) == len(captions)
        else (f"{len(empty)} of {len(captions)} captions are missing or empty: {labels.listed(empty)}")
    )
    return f"{which}. A picture's caption is a .txt file of the same name. {WHY_CAPTIONS}"


def on_zeroed_captions(zeroed: int, count: int) -> str | None:
    """Return how many of ``count`` captions contain no words because their conditioning is all zeros, or None if 0."""
    if not zeroed:
        return None
    return (
        f"{zeroed} of {count} captions {'is' if zeroed == 1 else 'are'} all zeros, as ConditioningZeroOut makes them: they hold "
        f"no words. {WHY_CAPTIONS}"
    )


def on_equal_captions(captions: Sequence[Hashable], pictures: Sequence[Hashable]) -> str | None:
    """Return how many captions are equal although their pictures differ, or None if hardly any are.

    Args:
        captions: A key for each picture's caption; equal captions have equal keys.
        pictures: A key for each picture. Repeated pictures may well share a caption.
    """
    alike: dict[Hashable, set[Hashable]] = defaultdict(set)
    for caption, picture in zip(captions, pictures, strict=True):
        alike[caption].add(picture)
    most, count = max(map(len, alike.values())), len(set(zip(captions, pictures, strict=True)))
    if most < min(FEWEST_ALIKE, count) or most < 2:
        return None
    which = f"All {count} captions" if most == count else f"{most} of {count} captions"
    return (
        f"{which} are the same. If that is not on purpose, the texts are probably empty, or the .txt files have other "
        f"names than the pictures. {WHY_CAPTIONS}"
    )

"""What is trained on: pictures, their captions and files, checked, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data import remarks
from ...data.picture_checks import likeness, only_colour
from ...errors import InvalidInputError
from .conditioning import flatten_conditionings, same_texts
from .pictures import Pictures


@dataclass(frozen=True)
class TrainingFile:
    """A file of a training folder.

    Attributes:
        name: Of the picture's file, for people.
        caption: Its text, without marks and blanks around it; "" if there is none.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Material:
    """Pictures and captions that can be trained on.

    Attributes:
        pictures: The pictures.
        captions: Single conditionings: one for all pictures, or one for each.
        blank: Pictures that show nothing, each with its colour.
        remarks: What is odd, in sentences.
    """

    pictures: Pictures
    captions: list[list]
    blank: Mapping[int, str]
    remarks: list[str]


def checked_material(images: Sequence[Any], positive: Sequence[Any], files: Sequence[Any] | None) -> Material:
    """Return what came in, checked and looked at.

    Raises:
        InvalidInputError: If a picture or caption cannot be used; the sentence names it.
    """
    described = _require_files(files or ())
    pictures = Pictures(images, [file.name for file in described])
    captions = flatten_conditionings(positive)
    colours = {index: only_colour(picture) for index, picture in enumerate(pictures)}
    blank = {index: colour for index, colour in colours.items() if colour}
    found = [
        remarks.on_blank(blank, pictures.labels),
        remarks.on_transparent(pictures.transparent, pictures.labels),
        _on_captions(captions, pictures, described),
    ]
    return Material(pictures, captions, blank, [sentence for sentence in found if sentence])


def _on_captions(captions: Sequence[list], pictures: Pictures, files: Sequence[TrainingFile]) -> str | None:
    """Return what is odd about captions of which each picture has its own."""
    if len(captions) != len(pictures) or len(captions) == 1:
        return None
    empty = remarks.on_empty_captions([file.caption for file in files], pictures.labels)
    return empty or remarks.on_equal_captions(same_texts(captions), [likeness(picture) for picture in pictures])


def _require_files(files: Sequence[Any]) -> list[TrainingFile]:
    described = [file for file in files if isinstance(file, TrainingFile)]
    if len(described) != len(files):
        raise InvalidInputError("`files` must come from Load Training Folder. Connect that, or nothing.")
    return described

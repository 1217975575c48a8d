"""Reference pictures of edit models, as they come from a graph; ``hosts.models.reference_latents`` encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...data.reference_pictures import ReferenceSettings, references_per_picture
from ...errors import InvalidInputError
from .conditioning import references_of
from .pictures import Pictures


@dataclass(frozen=True)
class References:
    """Reference pictures of a training.

    Attributes:
        pictures: All references; those of the first training picture come first.
        each: How many each training picture has; 0 if a single one is meant for all.
        settings: How they are shown to the model.
    """

    pictures: Pictures
    each: int
    settings: ReferenceSettings

    def of(self, picture: int) -> list[int]:
        """Return the indices of a training picture's references."""
        return list(range(self.each * picture, self.each * (picture + 1))) if self.each else [0]


def given_references(
    images: Sequence[Any], pictures: int, captions: Sequence[list], settings: ReferenceSettings
) -> References:
    """Return checked references.

    Args:
        images: IMAGEs.
        pictures: Number of training pictures.
        captions: Single conditionings.
        settings: How references are shown to the model.

    Raises:
        InvalidInputError: As :func:`checked_references`, and if their number does not fit.
    """
    checked = checked_references(images, captions)
    return References(checked, references_per_picture(len(checked), pictures), settings)


def checked_references(images: Sequence[Any], captions: Sequence[list]) -> Pictures:
    """Return reference pictures.

    Raises:
        InvalidInputError: If there are none, one cannot be used, or captions carry references of their own.
    """
    if not images:
        raise InvalidInputError(
            "No references came in. Choose a `reference_folder` on Load Training Folder, or connect nothing to "
            "`references`."
        )
    if any(references_of(caption) for caption in captions):
        raise InvalidInputError(
            "The captions carry reference latents already, and `references` is connected as well. Leave out one of "
            "both: ReferenceLatent and the `vae` of the text encoding, or `references`."
        )
    return Pictures(images, kind="Reference")

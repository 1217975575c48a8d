"""Reference pictures of edit models: which belong to which training picture, how large they are, which part is shown.

Axis legend: ``H W`` rows and columns in pixels, ``C`` colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..errors import InvalidInputError
from .on_access import OnAccess
from .patch_sampling import resize
from .remarks import Labels

ReferencePart = Literal["whole", "same part"]
REFERENCE_PARTS: tuple[str, ...] = get_args(ReferencePart)
_SAME_SHAPE = 0.02  # relative difference between two aspect ratios that still count as equal


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """How reference pictures are shown to the model.

    Attributes:
        size: Largest shorter side in pixels of a reference that is shown whole; nothing is scaled up.
        part: "whole" shows all of a reference whatever the crop of its picture is. "same part" shows the part that the
            crop shows of its picture, at the crop's size.

    Raises:
        InvalidInputError: If a setting is out of range.
    """

    size: int = 512
    part: ReferencePart = "whole"

    def __post_init__(self) -> None:
        if self.size < 16:
            raise InvalidInputError(f"reference_size must be at least 16 px, got {self.size}.")
        if self.part not in REFERENCE_PARTS:
            raise InvalidInputError(f"reference_part must be one of {', '.join(REFERENCE_PARTS)}, got {self.part!r}.")


def references_per_picture(references: int, pictures: int) -> int:
    """Return how many references each picture has, in the order of the pictures; 0 if one is meant for all.

    Raises:
        InvalidInputError: If the references cannot be distributed evenly.
    """
    if references == 1 and pictures > 1:
        return 0
    number, rest = divmod(references, pictures)
    if rest or not number:
        raise InvalidInputError(
            f"Expected one reference for all or equally many for each of the {pictures} pictures, got {references} "
            "references."
        )
    return number


def shown_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Return height and width in pixels at which a reference is shown whole.

    The shorter side is at most ``size``; nothing is scaled up. Both sides are rounded to multiples of ``multiple``, as
    in the hosts' edit workflows, which changes the aspect ratio a little.
    """
    scale = min(1.0, size / min(height, width))
    rows, columns = (max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
    return rows, columns


class WholeReferences(OnAccess):
    """References at the size at which they are shown whole, created on access.

    Args:
        pictures: Each (H, W, C), range [0, 1].
        size: Largest shorter side in pixels.
        multiple: Both sides are multiples of this number of pixels.
    """

    def __init__(self, pictures: Sequence[Tensor], size: int, multiple: int) -> None:
        self._pictures, self._size, self._multiple = pictures, size, multiple

    def __len__(self) -> int:
        return len(self._pictures)

    def one(self, index: int) -> Tensor:
        """Return a reference as it is shown."""
        picture = self._pictures[index]
        height, width, _ = picture.shape
        return resize(picture, *shown_size(height, width, self._size, self._multiple))


class AlignedReferences(OnAccess):
    """One reference of every training picture, brought to that picture's size, so that equal crops show equal parts.

    Args:
        references: All references, each (H, W, C), range [0, 1].
        chosen: Index of the reference of each training picture.
        sizes: Height and width in pixels of the training pictures.
        labels: The references' names in messages.

    Raises:
        InvalidInputError: If a reference has another shape than its picture.
    """

    def __init__(
        self, references: Sequence[Tensor], chosen: Sequence[int], sizes: Sequence[tuple[int, int]], labels: Labels
    ) -> None:
        self._references, self._chosen, self._sizes = references, chosen, sizes
        for index, (height, width) in zip(chosen, sizes, strict=True):
            rows, columns = references[index].shape[:2]
            if abs(rows * width / (columns * height) - 1.0) > _SAME_SHAPE:
                raise InvalidInputError(
                    f"{labels.full(index)} has {columns} x {rows} px and its picture {width} x {height} px, so they "
                    "have no part in common. Set `reference_part` to whole, or use references of the pictures' shape."
                )

    def __len__(self) -> int:
        return len(self._sizes)

    def one(self, index: int) -> Tensor:
        """Return the reference of a training picture at that picture's size."""
        return resize(self._references[self._chosen[index]], *self._sizes[index])

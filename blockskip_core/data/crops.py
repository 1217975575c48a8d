"""The crops that a schedule asks for, cut from the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from .patch_sampling import crop_and_resize, reference_size, resize
from .schedule import TrainingSchedule


class TrainingCrops(Sequence[Tensor]):
    """The crop of every draw at training size, each (patch_min, patch_min, 3); made on access.

    Args:
        pictures: Each (H, W, C), range [0, 1]; in the order of the sizes that the schedule was made for.
        schedule: The draws.
    """

    def __init__(self, pictures: Sequence[Tensor], schedule: TrainingSchedule) -> None:
        self._schedule = schedule
        self._references = [
            resize(picture, *reference_size(picture.shape[0], picture.shape[1], schedule.patches))
            for picture in pictures
        ]

    def __len__(self) -> int:
        return len(self._schedule)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        draw = self._schedule[index]
        reference = self._references[draw.picture]
        size = self._schedule.patches.patch_min
        return crop_and_resize(reference, top=draw.top, left=draw.left, side=draw.side, patch_min=size)

"""The crops that a schedule asks for, cut from the pictures."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor

from .on_access import OnAccess
from .patch_sampling import crop_and_resize, reference_size, resize
from .schedule import TrainingSchedule


class TrainingCrops(OnAccess):
    """The crop of every draw at its training size, created on access: (H, W, 3), with a first axis for clips.

    Only one picture at a time is held at its reference size, because all of them could take as much memory as the
    pictures themselves. So take many crops in the order of :meth:`by_picture`.

    Args:
        pictures: Each (H, W, C) or (F, H, W, C), range [0, 1], in the order of the sizes that the schedule was made for.
        schedule: The draws.
    """

    def __init__(self, pictures: Sequence[Tensor], schedule: TrainingSchedule) -> None:
        self._pictures, self._schedule = pictures, schedule
        self._held: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._schedule)

    def one(self, index: int) -> Tensor:
        """Create the crop of a draw."""
        draw = self._schedule[index]
        return crop_and_resize(
            self._reference(draw.picture),
            top=draw.top,
            left=draw.left,
            crop=self._schedule.crop_of(draw),
            size=self._schedule.size_of(draw.picture),
        )

    def by_picture(self, draws: Iterable[int]) -> list[int]:
        """Return draws in an order in which each picture is resized only once."""
        return sorted(draws, key=lambda index: self._schedule[index].picture)

    def alike(self) -> list[int]:
        """Return for every draw the first draw with the same crop, which is itself if there is none before it."""
        first: dict[Hashable, int] = {}
        return [first.setdefault(self._window(index), index) for index in range(len(self))]

    def taken(self, draws: Sequence[int]) -> list[Tensor]:
        """Return the crops of some draws, in their order."""
        made = {index: self.one(index) for index in self.by_picture(draws)}
        return [made[index] for index in draws]

    def _window(self, index: int) -> Hashable:
        draw = self._schedule[index]
        return draw.picture, draw.top, draw.left, self._schedule.crop_of(draw)

    def _reference(self, picture: int) -> Tensor:
        if self._held is None or self._held[0] != picture:
            self._held = None  # free it before the next one is created
            given = self._pictures[picture]
            rows, columns, size = given.shape[-3], given.shape[-2], self._schedule.size_of(picture)
            height, width = reference_size(rows, columns, self._schedule.patches, size)
            self._held = (picture, resize(given, height, width))
        return self._held[1]

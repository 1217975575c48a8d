"""Cuts the host's IMAGE batches into clips of equal length; single pictures among them stay pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.on_access import OnAccess
from ...data.remarks import Labels
from ...errors import InvalidInputError
from .pictures import Pictures


class Clips(OnAccess):
    """Clips of equal length, each (frames, H, W, 3), and pictures, (1, H, W, 3), float32 in [0, 1] on the CPU.

    Every IMAGE is a film. It is cut into as many clips as it has room for, one after the other from its beginning; the
    pictures that remain at its end are not used. An IMAGE of one picture beside films is a clip of one picture. As with
    single pictures, clips are views of the input where possible.

    Args:
        images: IMAGEs, one film or picture each.
        frames: Number of pictures of a clip.
        names: The films' file names; empty if unknown.

    Attributes:
        labels: The clips' names.
        films: Index of each clip's film.
        unused: Number of pictures that are in no clip.
        stills: Number of clips that are single pictures.
        transparent: Clips with transparent parts.

    Raises:
        InvalidInputError: If a film is shorter than a clip, or cannot be used.
    """

    def __init__(self, images: Sequence[Any], frames: int, names: Sequence[str] = ()) -> None:
        self._pictures = Pictures(images)
        has_films = any(len(film) > 1 for film in images)
        films = Labels(len(images), names if len(names) == len(images) else (), "Film")
        self._clips = list[Tensor]()
        self._starts, self.films = list[int](), list[int]()
        first = 0
        for number, film in enumerate(images):
            length = 1 if len(film) == 1 and has_films else frames
            if len(film) < length:
                raise _too_short(films.full(number), len(film), frames)
            for start in range(0, len(film) - length + 1, length):
                self._clips.append(film[start : start + length])
                self._starts.append(first + start)
                self.films.append(number)
            first += len(film)
        self.unused = first - sum(map(len, self._clips))
        self.stills = sum(len(clip) == 1 for clip in self._clips)
        self.labels = Labels(len(self._clips), [films.short(film) for film in self.films] if names else (), "Clip")
        see_through = set(self._pictures.transparent)
        self.transparent = [index for index in range(len(self)) if see_through & set(self._numbers(index))]

    def __len__(self) -> int:
        return len(self._clips)

    def one(self, index: int) -> Tensor:
        """Return a clip, converted if it must be."""
        numbers = self._numbers(index)
        if all(map(self._pictures.is_view, numbers)):
            return self._clips[index][..., :3]
        return torch.stack(self._pictures.taken(numbers))

    def _numbers(self, index: int) -> range:
        """Return the numbers of a clip's pictures among all."""
        return range(self._starts[index], self._starts[index] + len(self._clips[index]))

    def still(self, index: int) -> Tensor:
        """Return a clip's first picture, for a quick look at it."""
        return self._pictures[self._starts[index]]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each in pixels."""
        return [(clip.shape[1], clip.shape[2]) for clip in self._clips]

    def captions_for_each(self, captions: list[list]) -> list[list]:
        """Return one caption per clip if there is one per film; one caption for all stays as it is."""
        films = self.films[-1] + 1
        return [captions[film] for film in self.films] if len(captions) == films > 1 else captions


class FirstClips(OnAccess):
    """The first clip of every film, each (frames, H, W, 3), float32 in [0, 1] on the CPU.

    Args:
        images: IMAGEs, one film each.
        frames: Number of pictures of a clip.

    Raises:
        InvalidInputError: If a film is shorter than a clip, or cannot be used.
    """

    def __init__(self, images: Sequence[Any], frames: int) -> None:
        self._clips = Clips(images, frames)
        if self._clips.stills:
            number = [len(film) for film in images].index(1)
            raise _too_short(f"Film {number + 1} of {len(images)}", 1, frames)
        self._first = [self._clips.films.index(film) for film in range(len(images))]

    def __len__(self) -> int:
        return len(self._first)

    def one(self, index: int) -> Tensor:
        """Return a clip."""
        return self._clips[self._first[index]]


def _too_short(film: str, pictures: int, frames: int) -> InvalidInputError:
    return InvalidInputError(
        f"{film} has {pictures} pictures, and `frames` asks for clips of {frames}. Connect one film in each IMAGE batch, for "
        "example from Get Video Components, or lower `frames`."
    )

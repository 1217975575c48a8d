"""The shape of a word: its vectors for each text encoder, and the same numbers as one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInputError


@dataclass(frozen=True)
class WordPart:
    """The part of a word that one text encoder reads.

    Attributes:
        name: The encoder's key in embedding files, such as "clip_l".
        vectors: Number of vectors, each in the place of one token.
        width: Numbers of a vector.
        size: Root mean square of the numbers of an ordinary word; the unit of perturbations and steps.
    """

    name: str
    vectors: int
    width: int
    size: float


class WordLayout:
    """Where the parts of a word are in one row of numbers.

    Args:
        parts: The parts in order.

    Attributes:
        parts: As given.
        numbers: Length of a row.
        sizes: The unit of each number, shape (numbers,), float32.

    Raises:
        InvalidInputError: If there is no part, two have one name, or one is empty or without a size.
    """

    def __init__(self, parts: Sequence[WordPart]) -> None:
        self.parts = tuple(parts)
        names = [part.name for part in self.parts]
        if not self.parts or len(set(names)) < len(names):
            raise InvalidInputError(f"A word needs parts with different names, got {names}.")
        for part in self.parts:
            if part.vectors < 1 or part.width < 1 or not 0.0 < part.size < math.inf:
                raise InvalidInputError(f"A part of a word needs vectors, a width and a positive size, got {part}.")
        self.numbers = sum(part.vectors * part.width for part in self.parts)
        self.sizes = torch.cat([torch.full((part.vectors * part.width,), part.size) for part in self.parts])

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Return each part's vectors by name, shape (vectors, width), as views of a row of shape (numbers,)."""
        ends = row.split([part.vectors * part.width for part in self.parts])
        return {part.name: end.view(part.vectors, part.width) for part, end in zip(self.parts, ends, strict=True)}

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return the row of a word given by its parts; the inverse of :meth:`split`.

        Raises:
            InvalidInputError: If a part is missing or has another shape.
        """
        for part in self.parts:
            found = tuple(vectors[part.name].shape) if part.name in vectors else None
            if found != (part.vectors, part.width):
                raise InvalidInputError(f"{part.name} must have shape {(part.vectors, part.width)}, got {found}.")
        return torch.cat([vectors[part.name].reshape(-1) for part in self.parts])

"""Training pictures in the shape of their pictures: sizes of about equal area ("aspect ratio buckets").

The paper trains on squares (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.1). Difference from the paper: here the square is
one of several sizes whose sides are multiples of the model's cell and whose area is at most the square's, so that no
example has more tokens than one that is square. A picture gets the size whose proportions are nearest to its own, so
that a crop cuts away as little as possible. Eq. 1 then decides the scale of a crop of that size. Other trainers choose
among such sizes too, for whole pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from .patch_sampling import PatchConfig

PatchShape = Literal["square", "as pictures"]
PATCH_SHAPES: tuple[str, ...] = get_args(PatchShape)
LONGEST = 2
"""The longer side is at most so many times the square's side, and the shorter side at least its reciprocal."""


def bucket_sizes(config: PatchConfig) -> list[tuple[int, int]]:
    """Return the sizes (height, width) in pixels: for every height the largest width within the square's area."""
    side, cell = config.patch_min, config.multiple
    low, high = math.ceil(side / LONGEST / cell) * cell, LONGEST * side // cell * cell
    widths = {height: min(high, side * side // height // cell * cell) for height in range(low, high + 1, cell)}
    return [(height, width) for height, width in widths.items() if width >= low]


def bucket_of(height: int, width: int, config: PatchConfig) -> tuple[int, int]:
    """Return the size (height, width) in pixels whose proportions are nearest to a picture's; of equals the largest.

    Args:
        height, width: The picture in pixels.
        config: Side of the square, and what sides are multiples of.
    """
    wanted = math.log(width / height)

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        rows, columns = size
        return abs(math.log(columns / rows) - wanted), -rows * columns

    return min(bucket_sizes(config), key=distance)


def training_sizes(
    picture_sizes: Sequence[tuple[int, int]], config: PatchConfig, shape: PatchShape | Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Return the training size of every picture; empty if all are squares.

    Args:
        picture_sizes: Height and width in pixels of each.
        config: Side of the square, and what sides are multiples of.
        shape: "square", "as pictures", or the sizes.
    """
    if shape == "square":
        return ()
    sizes = [bucket_of(*size, config) for size in picture_sizes] if isinstance(shape, str) else shape
    return () if set(sizes) == {(config.patch_min, config.patch_min)} else tuple(sizes)

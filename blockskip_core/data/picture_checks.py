"""Checks whether a picture is usable for training: valid values, and not blank.

Axis legend: ``H W`` rows and columns in pixels, ``C`` colour channels.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -0.7, 1.7
"""Resampling overshoots: at worst, three-lobe Lanczos turns black and white pixels into values from -0.69 to 1.69."""
TOLERANCE = 0.1
MOST_OUTSIDE = 0.3
"""Share of the values that may overshoot by more than the tolerance. Overshoot only occurs along edges: in at most 0.28
of the worst picture, a chequered one, while half of a picture on a scale of -1 to 1 or -0.5 to 0.5 is negative."""
SAMPLED = 256
"""Maximum number of rows and columns to read where a sample is enough."""
SAME_COLOUR = 0.02
"""Difference between two colour values up to which they look the same, also after JPEG compression."""
FEW = 0.01
"""Share of a picture's pixels that may differ while it still counts as blank."""


def values_out_of_range(picture: Tensor) -> tuple[float, float] | None:
    """Return the smallest and largest value of a picture that is not on a scale from 0 to 1, or None if it is.

    A few overshooting values, as from resampling, do not mean another scale.

    Args:
        picture: Shape (H, W, C), floating point. NaN values count as out of range.
    """
    low, high = (float(value) for value in picture.aminmax())
    if low >= -TOLERANCE and high <= 1.0 + TOLERANCE:
        return None
    outside = (picture < -TOLERANCE) | (picture > 1.0 + TOLERANCE)
    if low >= LOWEST and high <= HIGHEST and float(outside.float().mean()) <= MOST_OUTSIDE:
        return None
    return low, high


def only_colour(picture: Tensor) -> str | None:
    """Return "white", "black" or "one colour" for a picture of (almost) a single colour, otherwise None.

    Args:
        picture: Shape (H, W, 3), range [0, 1].
    """
    pixels = _sample(picture).reshape(-1, picture.shape[-1])
    middle = pixels.median(dim=0).values
    differing = ((pixels - middle).abs().amax(dim=1) > SAME_COLOUR).float().mean()
    if float(differing) >= FEW:
        return None
    if float(middle.min()) >= 1.0 - SAME_COLOUR:
        return "white"
    return "black" if float(middle.max()) <= SAME_COLOUR else "one colour"


def is_transparent(alpha: Tensor) -> bool:
    """Return whether more than a few pixels are more than half transparent; alpha has shape (H, W)."""
    return float((_sample(alpha) < 0.5).float().mean()) > FEW


def likeness(picture: Tensor) -> str:
    """Return a key that is equal for equal pictures and differs for others: shape and a sample of the pixels."""
    pixels = _sample(picture).contiguous()
    return f"{tuple(picture.shape)} {hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()}"


def _sample(picture: Tensor) -> Tensor:
    """Return every n-th row and column as float32; a view if the picture is float32 already."""
    rows, columns = (math.ceil(length / SAMPLED) for length in picture.shape[:2])
    return picture[::rows, ::columns].to(torch.float32)

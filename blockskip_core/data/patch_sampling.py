"""Timestep-aware dynamic patch sampling (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.1, Eq. 1).

At high noise the model learns structure, so it gets a large crop; at low noise it learns detail, so it gets a small
one. Every crop is resized to the same small side, so that the token count never grows.

    f(s_min, s_max, t) = s_min + (t / T) * (s_max - s_min)

Axis legend: ``F`` frames of a clip, ``H W`` rows and columns in pixels, ``C`` colour channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidInputError

PatchOrder = Literal["low-to-high", "high-to-low", "random", "fixed"]
PATCH_ORDERS: tuple[str, ...] = get_args(PatchOrder)


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Which crops are trained on.

    Attributes:
        patch_min: Side in pixels of every training picture, and of the smallest crop (the paper's s_min).
        patch_max: Side in pixels of the largest crop (s_max). The paper's FLUX setting is 256 and 512.
        multiple: Crop sides are multiples of this: VAE down-sampling times the model's patch size.
        order: "low-to-high" is the paper's choice (small crops at low noise). "high-to-low" and "random" are its
            ablations; "fixed" always takes the largest crop, i.e. a plain resize.

    Raises:
        InvalidInputError: If the sides are not positive multiples of ``multiple`` or are out of order.
    """

    patch_min: int
    patch_max: int
    multiple: int = 16
    order: PatchOrder = "low-to-high"

    def __post_init__(self) -> None:
        for name in ("patch_min", "patch_max"):
            side = getattr(self, name)
            if side <= 0 or side % self.multiple:
                lower = max(self.multiple, side // self.multiple * self.multiple)
                raise InvalidInputError(
                    f"{name} must be a positive multiple of {self.multiple} px for this model, got {side}. "
                    f"Try {lower} or {lower + self.multiple}."
                )
        if self.patch_min > self.patch_max:
            raise InvalidInputError(
                f"patch_min must not be larger than patch_max, got {self.patch_min} and {self.patch_max}."
            )
        if self.order not in PATCH_ORDERS:
            raise InvalidInputError(f"Patch order must be one of {', '.join(PATCH_ORDERS)}, got {self.order!r}.")


def crop_side(t: float, config: PatchConfig, *, largest: int | None = None, rng: Random | None = None) -> int:
    """Return the side in pixels of the crop that is trained on at noise level ``t`` (Eq. 1).

    Args:
        t: Noise level in [0, 1]; 1 is pure noise. We use the sigma passed to the model, with T = 1.
        config: Sides, rounding and order.
        largest: Largest side that fits into the picture, if that is less than ``patch_max``.
        rng: Source for the "random" order; otherwise unused.

    Returns:
        A multiple of ``config.multiple`` in [patch_min, min(patch_max, largest)], monotone in ``t``.

    Raises:
        InvalidInputError: If ``t`` is outside [0, 1].

    Source: arXiv 2603.20755, Eq. 1. The paper says that sides follow the VAE's down-sampling factor but not how
    they are rounded: we round to the nearest multiple, halves up.
    """
    if not 0.0 <= t <= 1.0:
        raise InvalidInputError(f"The noise level must be in [0, 1], got {t}.")
    share = {"low-to-high": t, "high-to-low": 1.0 - t, "fixed": 1.0}.get(config.order)
    if share is None:
        share = (rng or Random()).random()
    top = config.patch_max if largest is None else min(config.patch_max, largest)
    exact = config.patch_min + share * (top - config.patch_min)
    side = math.floor(exact / config.multiple + 0.5) * config.multiple
    return max(config.patch_min, min(side, top // config.multiple * config.multiple))


def reference_size(
    height: int, width: int, config: PatchConfig, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the size in pixels to which a picture is brought before it is cropped.

    The paper crops from a reference picture whose side is s_max, so that the largest crop shows the whole subject.
    A larger picture is therefore scaled down until its shorter side is ``patch_max``, keeping its aspect ratio; with
    another training size than the square, until the largest crop of these proportions just fits. A smaller picture is
    left unchanged: nothing is ever scaled up.

    Args:
        height, width: The picture.
        config: Sides of the crops.
        size: Height and width of the training picture; None for the square of ``patch_min``.

    Raises:
        InvalidInputError: If the picture is smaller than the training picture.
    """
    rows, columns = size or (config.patch_min, config.patch_min)
    if height < rows or width < columns:
        patch = f"{rows} px" if rows == columns else f"{columns} x {rows} px"
        raise InvalidInputError(
            f"A picture of {width} x {height} px is smaller than the patch of {patch}. "
            f"Use pictures that are at least as large, or lower patch_min."
        )
    high, wide = crop_size(config.patch_max, config, size)
    scale = max(high / height, wide / width)
    if scale >= 1.0:
        return height, width
    return max(high, round(height * scale)), max(wide, round(width * scale))


def crop_size(side: int, config: PatchConfig, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return height and width in pixels of a crop that Eq. 1 gives a side.

    Args:
        side: The side; of the square with the same scale, if the training picture is none.
        config: Sides of the crops.
        size: Height and width of the training picture; None for the square of ``patch_min``.
    """
    if size is None:
        return side, side
    return round(size[0] * side / config.patch_min), round(size[1] * side / config.patch_min)


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Return ``picture`` resized with antialiasing, shape (..., H, W, C) -> (..., height, width, C), kept in [0, 1]."""
    *frames, rows, columns, _ = picture.shape
    if (rows, columns) == (height, width):
        return picture
    planes = picture.movedim(-1, -3)  # (..., C, H, W)
    if not frames:
        planes = planes.unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    if not frames:
        resized = resized.squeeze(0)
    return resized.movedim(-3, -1).clamp(0.0, 1.0)


def crop_and_resize(reference: Tensor, *, top: int, left: int, crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the rectangle at (top, left), resized with antialiasing to the training size.

    Args:
        reference: Picture at its reference size, shape (H, W, C), range [0, 1], or clip, shape (F, H, W, C).
        top, left: The rectangle's corner in pixels.
        crop: Its height and width in pixels; it is inside the picture.
        size: Height and width of the result in pixels.

    Returns:
        Shape (*size, C) or (F, *size, C), range [0, 1].
    """
    return resize(reference[..., top : top + crop[0], left : left + crop[1], :], *size)

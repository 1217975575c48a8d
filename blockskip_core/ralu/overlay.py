"""A picture of the regions that were refined early."""

from __future__ import annotations

import torch
from torch import Tensor

_TINT = (1.0, 0.45, 0.0)
_SHARE_OF_TINT = 0.45
_REST = 0.45  # brightness of what stayed coarse
_NO_PICTURE = 0.35  # grey in place of a picture that was not decoded


def refined_overlay(fine: Tensor, size: tuple[int, int], pictures: Tensor | None = None) -> Tensor:
    """Return pictures with the early regions tinted and the rest dimmed, shape (B, height, width, 3), in [0, 1].

    Args:
        fine: Regions refined early, shape (B, rows, columns), boolean.
        size: Height and width in pixels.
        pictures: Clean estimates when the choice was made, shape (B, H, W, 3), any size; grey if there are none.
    """
    if pictures is None:
        below = torch.full((len(fine), *size, 3), _NO_PICTURE)
    else:
        below = _resized(pictures.float().cpu().movedim(-1, 1), size, "bilinear").movedim(1, -1)
    early = _resized(fine[:, None].float().cpu(), size, "nearest").movedim(1, -1)
    tinted = (1.0 - _SHARE_OF_TINT) * below + _SHARE_OF_TINT * torch.tensor(_TINT)
    return (early * tinted + (1.0 - early) * _REST * below).clamp(0.0, 1.0)


def _resized(planes: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return torch.nn.functional.interpolate(planes, size=size, mode=mode)

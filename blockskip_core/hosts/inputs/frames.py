"""Convert between this package's latents (B, C, H, W) and those of the host's video models (B, C, 1, H, W).

Wan and Qwen-Image work on latents with an axis of frames. A picture is a video of one frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_FRAMES = 2  # the axis


def has_frames(model: Any) -> bool:
    """Return whether the host's model works on latents with an axis of frames."""
    return model.latent_format.latent_dimensions == 3


def latent_shape(model: Any, side: int) -> tuple[int, int, int]:
    """Return (C, H, W) of the latent of a square picture with ``side`` pixels."""
    form = model.latent_format
    cells = max(1, side // form.spacial_downscale_ratio)
    return (form.latent_channels, cells, cells)


def with_frame(model: Any, latents: Tensor) -> Tensor:
    """Return latents as the host's model takes them."""
    return latents.unsqueeze(_FRAMES) if has_frames(model) else latents


def without_frame(model: Any, latents: Tensor) -> Tensor:
    """Return latents as this package takes them; the inverse of :func:`with_frame`."""
    return latents.squeeze(_FRAMES) if has_frames(model) else latents

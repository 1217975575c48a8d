"""Pictures for models of videos: latents (B, C, H, W) of this package, (B, C, 1, H, W) for the host.

Wan and Qwen-Image work on latents with an axis of frames. A picture is a video of one frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_FRAMES = 2  # the axis


def has_frames(model: Any) -> bool:
    """Return whether the host's model works on latents with an axis of frames."""
    return model.latent_format.latent_dimensions == 3


def with_frame(model: Any, latents: Tensor) -> Tensor:
    """Return latents as the host's model takes them."""
    return latents.unsqueeze(_FRAMES) if has_frames(model) else latents


def without_frame(model: Any, latents: Tensor) -> Tensor:
    """Return latents as this package takes them, of what :func:`with_frame` made."""
    return latents.squeeze(_FRAMES) if has_frames(model) else latents

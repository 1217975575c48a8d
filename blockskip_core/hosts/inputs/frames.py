"""Convert between this package's latents (B, C, H, W) and those of the host's video models (B, C, F, H, W).

A picture is a video of one frame. In this package the frames of a clip are part of the channels, (B, C * F, H, W), because
crops, noise and the loss treat them alike; only the model needs to know which channels are which frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import InvalidInputError, UnsupportedModelError

_CHANNELS, _FRAMES = 1, 2  # the axes


def has_frames(model: Any) -> bool:
    """Return whether the host's model works on latents with an axis of frames."""
    return model.latent_format.latent_dimensions == 3


def latent_frames(model: Any, pictures: int) -> int:
    """Return the number of latent frames of a clip of ``pictures`` pictures.

    Raises:
        InvalidInputError: If the model makes pictures, or its clips have other lengths.
        UnsupportedModelError: If the host does not say how many pictures a latent frame holds.
    """
    if pictures == 1:
        return 1
    if pictures < 1:
        raise InvalidInputError(f"`frames` must be at least 1, got {pictures}.")
    if not has_frames(model):
        raise InvalidInputError(f"`frames` is {pictures}, but this model makes pictures. Set it to 1.")
    per_frame = getattr(model.latent_format, "temporal_downscale_ratio", None)
    if per_frame is None:
        raise UnsupportedModelError("This version of ComfyUI cannot train on clips. Update it, or set `frames` to 1.")
    whole, rest = divmod(pictures - 1, per_frame)
    if rest:
        raise InvalidInputError(
            f"`frames` must be a multiple of {per_frame} plus 1 for this model, got {pictures}. "
            f"Try {whole * per_frame + 1} or {(whole + 1) * per_frame + 1}."
        )
    return whole + 1


def latent_shape(model: Any, side: int, frames: int = 1) -> tuple[int, int, int]:
    """Return (C, H, W) of the latent of a square picture with ``side`` pixels, or of a clip of ``frames`` latent frames."""
    form = model.latent_format
    cells = max(1, side // form.spacial_downscale_ratio)
    return (form.latent_channels * frames, cells, cells)


def frames_in(model: Any, channels: int) -> int:
    """Return the number of latent frames that latents of this package with so many channels hold."""
    return channels // model.latent_format.latent_channels if has_frames(model) else 1


def with_frames(model: Any, latents: Tensor) -> Tensor:
    """Return latents as the host's model takes them."""
    if not has_frames(model):
        return latents
    return latents.unflatten(_CHANNELS, (model.latent_format.latent_channels, -1))


def without_frames(model: Any, latents: Tensor) -> Tensor:
    """Return latents as this package takes them; the inverse of :func:`with_frames`."""
    return latents.flatten(_CHANNELS, _FRAMES) if has_frames(model) else latents

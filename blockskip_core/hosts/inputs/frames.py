"""Convert between this package's latents (B, C, H, W) and those of the host's video models (B, C, F, H, W).

A picture is a video of one frame. In this package the frames of a clip are part of the channels, (B, C * F, H, W), because
crops, noise and the loss treat them alike; only the model needs to know which channels are which frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...data.clip_lengths import ClipLengths
from ...errors import InvalidInputError, UnsupportedModelError

_CHANNELS, _FRAMES = 1, 2  # the axes


def has_frames(model: Any) -> bool:
    """Return whether the host's model works on latents with an axis of frames."""
    return model.latent_format.latent_dimensions == 3


def latent_frames(model: Any, pictures: int, lengths: ClipLengths | None = None) -> int:
    """Return the number of latent frames of a clip of ``pictures`` pictures.

    Args:
        model: The host's model (a BaseModel).
        pictures: Number of pictures.
        lengths: Lengths of the model's clips, if its format of latents does not say them.

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
    lengths = lengths or _lengths_by_format(model)
    found = lengths.latent_frames(pictures)
    if found is None:
        fewer, more = lengths.near(pictures)
        raise InvalidInputError(
            f"`frames` must be a multiple of {lengths.step} plus {lengths.shortest} for this model, got {pictures}. "
            f"Try {fewer} or {more}."
        )
    return found


def _lengths_by_format(model: Any) -> ClipLengths:
    per_frame = getattr(model.latent_format, "temporal_downscale_ratio", None)
    if per_frame is None:
        raise UnsupportedModelError("This version of ComfyUI cannot train on clips. Update it, or set `frames` to 1.")
    return ClipLengths(shortest=1, shortest_latent=1, step=per_frame, step_latent=1)


def latent_channels(model: Any) -> int:
    """Return the number of channels of a latent frame.

    Formats of video and sound together say the larger of both numbers; then the model itself knows the video's.
    """
    own = getattr(model, "diffusion_model", None)
    return getattr(own, "latents_dim", model.latent_format.latent_channels)


def latent_shape(model: Any, side: int, frames: int = 1) -> tuple[int, int, int]:
    """Return (C, H, W) of the latent of a square picture with ``side`` pixels, or of a clip of ``frames`` latent frames."""
    form = model.latent_format
    cells = max(1, side // form.spacial_downscale_ratio)
    return (latent_channels(model) * frames, cells, cells)


def frames_in(model: Any, channels: int) -> int:
    """Return the number of latent frames that latents of this package with so many channels hold."""
    return channels // latent_channels(model) if has_frames(model) else 1


def with_frames(model: Any, latents: Tensor) -> Tensor:
    """Return latents as the host's model takes them."""
    if not has_frames(model):
        return latents
    return latents.unflatten(_CHANNELS, (latent_channels(model), -1))


def without_frames(model: Any, latents: Tensor) -> Tensor:
    """Return latents as this package takes them; the inverse of :func:`with_frames`."""
    return latents.flatten(_CHANNELS, _FRAMES) if has_frames(model) else latents

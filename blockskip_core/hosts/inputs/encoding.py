"""Training crops -> latents, through the connected VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.latents import Latents, joined
from ...errors import InvalidInputError
from .frames import has_frames, latent_channels, without_frames


def crop_multiple(vae: Any, patch_size: int) -> int:
    """Return the number of pixels that crop sides are multiples of: VAE down-sampling times the model's patch size."""
    return int(vae.spacial_compression_encode()) * patch_size


def encode_one(vae: Any, model: Any, picture: Tensor, frames: int = 1) -> Tensor:
    """Return the latent of a picture as the VAE makes it; :func:`encode_crops` says what the arguments are.

    Raises:
        InvalidInputError: If it does not fit the model.
    """
    latent = vae.encode(picture if picture.ndim == 4 else picture.unsqueeze(0))
    require_fitting(latent, model, frames)
    return latent


def encode_crops(
    vae: Any,
    model: Any,
    crops: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
    *,
    frames: Callable[[int], int] = lambda pictures: 1,
    order: Sequence[int] = (),
    alike: Sequence[int] = (),
) -> Latents:
    """Return the crops' latents in the model's own scale, each (C * F, H, W), float32 on the CPU.

    The host's ``process_latent_in`` is applied here, once; nothing after this may apply it again.

    Args:
        vae: The VAE.
        model: The host's model that it belongs to.
        crops: Each (height, width, 3) in [0, 1], or a clip of these with a first axis.
        progress: Called with (different crops done, total); may raise to interrupt.
        frames: Number of pictures of a crop -> number of its latent frames.
        order: The order in which to read all crops; empty for their own order. The latents are in the crops' order.
        alike: For each crop the first one that is the same, as of :meth:`TrainingCrops.alike`; each of these is encoded
            once. Empty if all differ.

    Raises:
        InvalidInputError: If the VAE's latents do not fit the model, or are not finite.
    """
    latents: dict[int, Tensor] = {}
    alike = alike or range(len(crops))
    distinct = [index for index in order or range(len(crops)) if alike[index] == index]
    for index in distinct:
        crop = crops[index]
        latent = encode_one(vae, model, crop, frames(len(crop) if crop.ndim == 4 else 1))
        latents[index] = without_frames(model, model.process_latent_in(latent))[0].float().cpu()
        if progress:
            progress(len(latents), len(distinct))
    if not all(torch.isfinite(latent).all() for latent in latents.values()):
        raise InvalidInputError("The VAE made latents with NaN or Inf. Load it in fp32 or bf16.")
    # Each its own memory: files of tensors refuse shared ones.
    return joined(latents[first] if first == index else latents[first].clone() for index, first in enumerate(alike))


def require_fitting(latent: Tensor, model: Any, frames: int) -> None:
    """Refuse latents of another VAE before they are scaled: broadcasting could hide the mismatch."""
    channels = latent_channels(model)
    if latent.shape[1] != channels:
        raise InvalidInputError(
            f"The model works on latents of {channels} channels, this VAE makes {latent.shape[1]}. "
            "Load the VAE that belongs to the model."
        )
    expected = f"{frames} frame{'s' if frames > 1 else ''}" if has_frames(model) else "no axis of frames"
    fits = latent.ndim == 5 and latent.shape[2] == frames if has_frames(model) else latent.ndim == 4
    if not fits:
        raise InvalidInputError(
            f"The model works on latents with {expected}, this VAE makes latents of shape {tuple(latent.shape)}. "
            "Load the VAE that belongs to the model."
        )

"""Training crops -> latents, through the connected VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInputError
from .frames import has_frames, without_frame


def crop_multiple(vae: Any, patch_size: int) -> int:
    """Return the number of pixels that crop sides are multiples of: VAE down-sampling times the model's patch size."""
    return int(vae.spacial_compression_encode()) * patch_size


def encode_crops(
    vae: Any,
    model: Any,
    crops: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
    *,
    order: Sequence[int] = (),
) -> Tensor:
    """Return the crops' latents in the model's own scale, shape (num_draws, C, H, W), float32 on the CPU.

    The host's ``process_latent_in`` is applied here, once; nothing after this may apply it again.

    Args:
        vae: The VAE.
        model: The host's model that it belongs to.
        crops: Each (side, side, 3) in [0, 1].
        progress: Called with (crops done, total); may raise to interrupt.
        order: The order in which to read all crops; empty for their own order. The latents are in the crops' order.

    Raises:
        InvalidInputError: If the VAE's latents do not fit the model, or are not finite.
    """
    latents: dict[int, Tensor] = {}
    for index in order or range(len(crops)):
        latent = vae.encode(crops[index].unsqueeze(0))
        _require_fitting(latent, model)
        latents[index] = without_frame(model, model.process_latent_in(latent)).float().cpu()
        if progress:
            progress(len(latents), len(crops))
    stacked = torch.cat([latents[index] for index in range(len(crops))])
    if not torch.isfinite(stacked).all():
        raise InvalidInputError("The VAE made latents with NaN or Inf. Load it in fp32 or bf16.")
    return stacked


def _require_fitting(latent: Tensor, model: Any) -> None:
    """Refuse latents of another VAE before they are scaled: broadcasting could hide the mismatch."""
    channels, frames = model.latent_format.latent_channels, has_frames(model)
    if latent.shape[1] != channels:
        raise InvalidInputError(
            f"The model works on latents of {channels} channels, this VAE makes {latent.shape[1]}. "
            "Load the VAE that belongs to the model."
        )
    if latent.ndim != (5 if frames else 4) or (frames and latent.shape[2] != 1):
        raise InvalidInputError(
            f"The model works on latents with {'one frame' if frames else 'no axis of frames'}, this VAE makes latents "
            f"of shape {tuple(latent.shape)}. Load the VAE that belongs to the model."
        )

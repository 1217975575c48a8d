"""Pictures and training crops -> latents, through the connected VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInputError
from .frames import has_frames, without_frame


def flatten_pictures(images: Sequence[Tensor]) -> list[Tensor]:
    """Return single pictures, each (H, W, 3) in [0, 1], from a list of IMAGEs (batches of equal size).

    Raises:
        InvalidInputError: If there is none, or one is not a finite picture with colour channels.
    """
    for index, batch in enumerate(images):
        if not isinstance(batch, Tensor) or batch.ndim < 2:
            raise InvalidInputError(
                f"Number {index} of `images` is not a picture. Connect Load Image or a dataset node."
            )
    pictures = [picture for batch in images for picture in batch]
    if not pictures:
        raise InvalidInputError("No pictures came in. Connect Load Image or a dataset node to `images`.")
    for index, picture in enumerate(pictures):
        if picture.ndim != 3 or picture.shape[-1] < 3 or 0 in picture.shape:
            raise InvalidInputError(
                f"Picture {index} must have rows, columns and 3 colours, got shape {tuple(picture.shape)}."
            )
        if not torch.isfinite(picture).all():
            raise InvalidInputError(f"Picture {index} contains NaN or Inf. Check the node that made it.")
    return [picture[..., :3].float().clamp(0.0, 1.0) for picture in pictures]


def crop_multiple(vae: Any, patch_size: int) -> int:
    """Return the number of pixels that crop sides are multiples of: VAE down-sampling times the model's patch size."""
    return int(vae.spacial_compression_encode()) * patch_size


def encode_crops(
    vae: Any, model: Any, crops: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Return the crops' latents in the model's own scale, shape (num_draws, C, H, W), float32 on the CPU.

    The host's ``process_latent_in`` is applied here, once; nothing after this may apply it again.

    Raises:
        InvalidInputError: If the VAE's latents do not fit the model, or are not finite.
    """
    latents = []
    for index, crop in enumerate(crops):
        latent = vae.encode(crop.unsqueeze(0))
        _require_fitting(latent, model)
        latents.append(without_frame(model, model.process_latent_in(latent)).float().cpu())
        if progress:
            progress(index + 1, len(crops))
    stacked = torch.cat(latents)
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

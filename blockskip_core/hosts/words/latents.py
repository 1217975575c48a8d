"""Pictures -> latents of one size, mirrored ones too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInputError
from ..inputs.middles import Middles, encoded_middles


def square_latents(
    vae: Any, model: Any, pictures: Sequence[Tensor], side: int, mirror: bool, progress: Callable[[int, int], None]
) -> Tensor:
    """Return the pictures' latents in the model's own scale, shape (pictures, C, side / 8, side / 8) or so.

    Raises:
        InvalidInputError: If the VAE does not fit the model, or the side is no multiple of what it needs.
    """
    step = int(vae.spacial_compression_encode()) * 2  # every diffusion transformer takes an even number of cells
    if side % step:
        raise InvalidInputError(f"resolution must be a multiple of {step} px for this VAE, got {side}.")
    with torch.no_grad():
        return encoded_middles(vae, model, Middles(pictures, side, side, mirror), progress)

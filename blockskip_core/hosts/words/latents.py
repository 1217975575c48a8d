"""Pictures -> latents of one size, mirrored ones too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...data.latents import in_batch
from ...data.on_access import OnAccess
from ...errors import InvalidInputError
from ..inputs.encoding import encode_crops


class Squares(OnAccess):
    """Pictures cut to their middle square and resized, (side, side, 3) each; after all of them the mirrored ones.

    Args:
        pictures: Each (H, W, 3) in [0, 1].
        side: In pixels.
        mirror: Whether the mirrored ones follow.
    """

    def __init__(self, pictures: Sequence[Tensor], side: int, mirror: bool) -> None:
        self._pictures, self._side, self._mirror = pictures, side, mirror

    def __len__(self) -> int:
        return len(self._pictures) * (1 + self._mirror)

    def one(self, index: int) -> Tensor:
        """Return a square."""
        mirrored, number = divmod(index, len(self._pictures))
        planes = self._pictures[number].movedim(-1, 0)[None]
        square = comfy.utils.common_upscale(planes, self._side, self._side, "bicubic", "center").clamp(0.0, 1.0)
        return (square.flip(3) if mirrored else square)[0].movedim(0, -1).contiguous()


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
        squares = encode_crops(vae, model, Squares(pictures, side, mirror), progress)
    return in_batch(squares, range(len(squares)))

"""Pictures and clips cut to the middle part of a wanted shape, and resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.utils
from torch import Tensor

from ...data.latents import in_batch
from ...data.on_access import OnAccess
from .encoding import encode_crops


class Middles(OnAccess):
    """The middle parts of pictures, (height, width, 3) each, or of clips; after all of them the mirrored ones.

    Args:
        pictures: Each (H, W, 3) in [0, 1], or a clip (frames, H, W, 3).
        width, height: In pixels.
        mirror: Whether the mirrored ones follow.
    """

    def __init__(self, pictures: Sequence[Tensor], width: int, height: int, mirror: bool = False) -> None:
        self._pictures, self._width, self._height, self._mirror = pictures, width, height, mirror

    def __len__(self) -> int:
        return len(self._pictures) * (1 + self._mirror)

    def one(self, index: int) -> Tensor:
        """Return a part."""
        mirrored, number = divmod(index, len(self._pictures))
        picture = self._pictures[number]
        planes = (picture if picture.ndim == 4 else picture[None]).movedim(-1, 1)
        part = comfy.utils.common_upscale(planes, self._width, self._height, "bicubic", "center").clamp(0.0, 1.0)
        parts = (part.flip(3) if mirrored else part).movedim(1, -1)
        return (parts if picture.ndim == 4 else parts[0]).contiguous()


def encoded_middles(
    vae: Any, model: Any, middles: Middles, progress: Callable[[int, int], None], frames: int = 1
) -> Tensor:
    """Return the parts' latents in the model's own scale, (parts, C, height, width) in latent cells.

    Args:
        vae: The VAE.
        model: The host's model that it belongs to.
        middles: The parts.
        progress: Called with (parts done, total); may raise to interrupt.
        frames: Latent frames of each.

    Raises:
        InvalidInputError: If the VAE's latents do not fit the model, or are not finite.
    """
    latents = encode_crops(vae, model, middles, progress, frames=lambda pictures: frames)
    return in_batch(latents, range(len(latents)))

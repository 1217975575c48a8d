"""Whole pictures and clips that another node has encoded: LATENTs in place of IMAGEs, as of core's dataset nodes.

Each is one training picture as it is: nothing is cropped, scaled or encoded again. Core's Resolution Bucket gives one
LATENT for each size, and one CONDITIONING that lists the texts of its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.latents import Latents, joined
from ...data.on_access import OnAccess
from ...data.remarks import Labels
from ...errors import InvalidInputError
from .encoding import require_fitting
from .frames import without_frames

_SAMPLES = "samples"  # the host's key


def are_latents(images: Sequence[Any]) -> bool:
    """Return whether the host's LATENTs came in."""
    return any(isinstance(one, Mapping) for one in images)


@dataclass(frozen=True)
class LatentRows:
    """Single latents as a VAE makes them, each (1, C, H, W) or (1, C, F, H, W), and what the node says about pictures.

    Attributes:
        rows: The latents.
        labels: Their names in messages.
        transparent: None of them.
        unused: None of them.
    """

    rows: Sequence[Tensor]
    labels: Labels
    transparent: Sequence[int] = ()
    unused: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, given: Sequence[Any]) -> LatentRows:
        """Return the latents of some LATENTs, in their order.

        Raises:
            InvalidInputError: If one is no LATENT of pictures.
        """
        rows: list[Tensor] = []
        for number, one in enumerate(given, 1):
            if not isinstance(one, Mapping):
                raise InvalidInputError(
                    f"Input {number} of `images` is no LATENT, and others are. Connect only IMAGEs, or only LATENTs such as "
                    "those of Resolution Bucket."
                )
            samples = one.get(_SAMPLES)
            if not isinstance(samples, Tensor) or samples.ndim not in (4, 5) or 0 in samples.shape:
                found = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
                raise InvalidInputError(
                    f"Input {number} of `images` is a LATENT, but not of pictures: expected samples of shape (N, C, H, W) or "
                    f"(N, C, F, H, W), got {found}. Connect IMAGEs, or LATENTs such as those of Resolution Bucket."
                )
            rows += samples.split(1)
        return cls(rows, Labels(len(rows), (), "Latent"))


def captions_of_rows(positive: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """Return one CONDITIONING for each latent if every CONDITIONING lists the texts of one LATENT's rows.

    Args:
        positive: CONDITIONINGs.
        given: LATENTs.
    """
    counts = [len(one[_SAMPLES]) for one in given]
    if [len(texts) if isinstance(texts, (list, tuple)) else 0 for texts in positive] != counts:
        return list(positive)
    return [[text] for texts in positive for text in texts]


class WholeLatents(OnAccess):
    """Latents to be trained on whole; as a sequence, the pictures or clips that they decode to, for people to look at.

    Args:
        given: The latents.
        vae: The VAE that made them.
        model: The host's model that it belongs to.
        patch_size: Side in cells of a token.

    Attributes:
        rows: The latents as given.
        sizes: Height and width of each in pixels.

    Raises:
        InvalidInputError: If one does not fit the model.
    """

    def __init__(self, given: LatentRows, vae: Any, model: Any, patch_size: int) -> None:
        self.rows, self._vae, self._model = given.rows, vae, model
        cell = int(vae.spacial_compression_encode())
        for index, latent in enumerate(given.rows):
            require_fitting(latent, model, latent.shape[2])
            rows, columns = latent.shape[-2:]
            if rows % patch_size or columns % patch_size:
                raise InvalidInputError(
                    f"{given.labels.full(index)} has {columns} x {rows} cells, and this model takes multiples of {patch_size}. "
                    f"Bring its picture to multiples of {cell * patch_size} px before it is encoded."
                )
        self.sizes = [(latent.shape[-2] * cell, latent.shape[-1] * cell) for latent in given.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def one(self, index: int) -> Tensor:
        """Return what a latent decodes to: (H, W, 3), or a clip of these with a first axis."""
        decoded = self._vae.decode(self.rows[index])
        pictures = decoded.reshape(-1, *decoded.shape[-3:])[..., :3].float().cpu().clamp(0.0, 1.0)
        return pictures if len(pictures) > 1 else pictures[0]

    def square(self, multiple: int) -> int:
        """Return the side in pixels of the smallest square, a multiple of ``multiple``, that no picture exceeds in area."""
        return math.ceil(math.sqrt(max(map(math.prod, self.sizes))) / multiple) * multiple

    def of_draws(self, pictures: Sequence[int]) -> Latents:
        """Return the latents of draws in the model's own scale, each (C * F, H, W), float32 on the CPU.

        Args:
            pictures: Number of the latent of every draw.

        Raises:
            InvalidInputError: If one is not finite.
        """
        own = [without_frames(self._model, self._model.process_latent_in(row))[0].float().cpu() for row in self.rows]
        if not all(torch.isfinite(row).all() for row in own):
            raise InvalidInputError("`images` has latents with NaN or Inf. Check the node that encoded them.")
        return joined(own[picture].clone() for picture in pictures)  # files keep no tensors that share memory

"""How alike a sampled picture is to the training pictures: CLIP-I, the mean cosine of picture embeddings.

    likeness(x) = mean over training pictures y of  f(x) . f(y) / (|f(x)| |f(y)|)

f is the connected vision encoder: with CLIP this is CLIP-I, with DINO the score of that name (DreamBooth, arXiv
2208.12242, Sec. 4.3). DiT-BlockSkip reports the same two. The mean of the normalised f(y) is all that has to be kept:

    likeness(x) = f(x) / |f(x)| . mean_y f(y) / |f(y)|
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInputError
from ..inputs.pictures import Pictures
from ..models.identity import tensors_identity
from ..models.residency import unload
from .picture_embeddings import embedded, require_vectors


class Likeness:
    """Compares pictures with the training pictures, which are encoded once, when it is created.

    The encoder is loaded for the time of a comparison only.

    Args:
        clip_vision: The host's CLIP_VISION.
        images: The host's IMAGEs; the same one given several times counts once.
        on_picture: Called after every encoded picture with (done, total); may raise to interrupt.

    Raises:
        InvalidInputError: If the encoder gives no vectors, there is no picture, or one is not on the scale from 0 to 1.
    """

    def __init__(self, clip_vision: Any, images: Sequence[Any], on_picture: Callable[[int, int], None]) -> None:
        require_vectors(clip_vision)
        self._encoder = clip_vision
        pictures = Pictures(list({id(image): image for image in images}.values()), kind="Reference picture")
        total = torch.zeros(())
        for done, direction in enumerate(self._directions(pictures), 1):
            total = total + direction
            on_picture(done, len(pictures))
        self._mean = total / len(pictures)

    @property
    def identity(self) -> str:
        """Content hash of what pictures are compared with, as this encoder sees it."""
        return tensors_identity([self._mean])

    def of(self, pictures: Sequence[Tensor]) -> list[float]:
        """Return the likeness of every picture, from -1 to 1; each (H, W, 3) in [0, 1]."""
        return [(direction @ self._mean).item() for direction in self._directions(pictures)]

    def _directions(self, pictures: Sequence[Tensor]) -> Any:
        """Yield the embedding of every picture, normalised, in float64, and unload the encoder."""
        try:
            for picture in pictures:
                with torch.inference_mode():  # as in the host
                    (vector,) = embedded(self._encoder, picture[None]).double().cpu()
                yield torch.nn.functional.normalize(vector, dim=0)
        finally:
            unload(self._encoder.patcher)


def likeness_for(
    clip_vision: Any, images: Sequence[Any] | None, on_picture: Callable[[int, int], None]
) -> Likeness | None:
    """Return the likeness to the connected pictures, or None if nothing is connected.

    Raises:
        InvalidInputError: If only one of the two is connected; otherwise as :class:`Likeness`.
    """
    require_both(clip_vision is not None, images is not None)
    return None if clip_vision is None or images is None else Likeness(clip_vision, images, on_picture)


def require_both(has_encoder: bool, has_pictures: bool) -> None:
    """Raise InvalidInputError if there is an encoder without pictures, or the reverse."""
    if has_encoder != has_pictures:
        missing, use = (
            ("reference_images", "the training pictures, e.g. Load Training Folder's `images`")
            if has_encoder
            else ("clip_vision", "Load CLIP Vision")
        )
        raise InvalidInputError(
            f"The likeness of samples needs `clip_vision` and `reference_images`, and `{missing}` is not connected. "
            f"Connect {use}, or neither of the two."
        )

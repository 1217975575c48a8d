"""Pictures as vectors, by the host's vision encoders: CLIP and DINOv2.

The host reads SigLIP and DINOv3 too, but gives only their tokens: it has no pooling head of SigLIP, and its CLIP_VISION
cannot be called with a DINOv3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import InvalidInputError

CLIP, DINO = "clip_vision_model", "dinov2"
"""The host's names for the kinds of encoders that give one vector per picture."""


def embedded(clip_vision: Any, pictures: Tensor) -> Tensor:
    """Return one vector per picture, shape (N, D), of the kind that the encoder's own papers compare.

    Args:
        clip_vision: The host's CLIP_VISION.
        pictures: Shape (N, H, W, 3) in [0, 1]; the host scales the shorter side to the encoder's and crops the middle.

    Raises:
        InvalidInputError: If it is an encoder of another kind.
    """
    require_vectors(clip_vision)
    output = clip_vision.encode_image(pictures)
    if output["image_embeds"] is not None and encoder_kind(clip_vision) == CLIP:
        return output["image_embeds"]
    return output["last_hidden_state"][:, 0]  # the class token, which is DINO's embedding


def require_vectors(clip_vision: Any) -> None:
    """Raise InvalidInputError unless the host gives one vector per picture for this encoder."""
    kind = encoder_kind(clip_vision)
    if kind not in (CLIP, DINO):
        raise InvalidInputError(
            f"`clip_vision` is a {kind}, for which ComfyUI gives no single vector per picture. Connect a CLIP or DINOv2."
        )


def encoder_kind(clip_vision: Any) -> str:
    """Return the host's name for the kind of encoder."""
    return getattr(clip_vision, "model_type", CLIP)

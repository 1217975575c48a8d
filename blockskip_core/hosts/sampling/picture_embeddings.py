"""Pictures as vectors, by the host's vision encoders: CLIP, SigLIP and DINO."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def embedded(clip_vision: Any, pictures: Tensor) -> Tensor:
    """Return one vector per picture, shape (N, D), of the kind that the encoder's own papers compare.

    Args:
        clip_vision: The host's CLIP_VISION.
        pictures: Shape (N, H, W, 3) in [0, 1]; the host scales the shorter side to the encoder's and crops the middle.
    """
    output = clip_vision.encode_image(pictures)
    if output["image_embeds"] is not None and not encoder_kind(clip_vision).startswith("dino"):
        return output["image_embeds"]
    return output["last_hidden_state"][:, 0]  # the class token, which is DINO's embedding


def encoder_kind(clip_vision: Any) -> str:
    """Return the host's name for the kind of encoder."""
    return getattr(clip_vision, "model_type", "clip_vision_model")

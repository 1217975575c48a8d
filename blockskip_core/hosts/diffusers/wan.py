"""Wan 2.1 and 2.2, text to video, in diffusers, used with one frame. Layout as of diffusers 0.42.

Image tokens only, which see the text by cross attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import IMAGE_ONLY, Family, Text, default_of_call, normalised_frame


def _velocity(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    output = model(noisy[:, :, None], sigmas * 1000.0, text["encoder_hidden_states"], return_dict=False)[0]
    return output[:, :, 0]


def _encoded(pipeline: Any, text: str, device: torch.device) -> Text:
    length = default_of_call(pipeline, "max_sequence_length")
    tokens, _ = pipeline.encode_prompt(
        text, device=device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": tokens}


WAN = Family(
    name="wan",
    title="Wan 2.1 and 2.2 (text to video)",
    model_class="WanTransformer3DModel",
    pipelines=("WanPipeline",),
    lists={"blocks": IMAGE_ONLY},
    stem=("patch_embedding", "condition_embedder"),
    head=("norm_out", "proj_out"),
    velocity=_velocity,
    encode_text=_encoded,
    encode_picture=normalised_frame,
    is_supported=lambda config: config.image_dim is None and config.in_channels == config.out_channels,
    patch=2,
    cross_attention="attn2.to_out.0",
)

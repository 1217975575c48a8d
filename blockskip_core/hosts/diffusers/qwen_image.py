"""Qwen-Image in diffusers: double-stream blocks only. Layout as of diffusers 0.42."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import Family, Text, default_of_call, normalised_frame, packed, separate_streams, unpacked


def _velocity(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    rows, columns = noisy.shape[-2:]
    output = model(
        hidden_states=packed(noisy),
        encoder_hidden_states=text["encoder_hidden_states"],
        encoder_hidden_states_mask=text.get("encoder_hidden_states_mask"),
        timestep=sigmas,
        img_shapes=[[(1, rows // 2, columns // 2)]] * len(noisy),
        return_dict=False,
    )[0]
    return unpacked(output, noisy)


def _encoded(pipeline: Any, text: str, device: torch.device) -> Text:
    length = default_of_call(pipeline, "max_sequence_length")
    tokens, mask = pipeline.encode_prompt(text, device=device, max_sequence_length=length)
    return {"encoder_hidden_states": tokens} if mask is None else {
        "encoder_hidden_states": tokens, "encoder_hidden_states_mask": mask,
    }  # fmt: skip


QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    model_class="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline",),
    lists={
        "transformer_blocks": separate_streams(
            "attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"
        )
    },
    stem=("time_text_embed", "txt_norm", "img_in", "txt_in"),
    head=("norm_out", "proj_out"),
    velocity=_velocity,
    encode_text=_encoded,
    encode_picture=normalised_frame,
    channels=lambda config: config.in_channels // 4,
    is_supported=lambda config: not (config.guidance_embeds or config.use_additional_t_cond or config.use_layer3d_rope),
    patch=2,
    borrowed=("pos_embed",),
)

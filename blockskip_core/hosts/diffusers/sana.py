"""SANA in diffusers (arXiv 2410.10629), the second model of DiT-BlockSkip. Layout as of diffusers 0.42.

Image tokens only: linear attention among themselves, cross attention to the text, then a convolution. Its autoencoder
(DC-AE) makes one cell of 32 x 32 pixels, and a cell is a token. The paper trains it on crops of 512 px from pictures of
1024 px.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .family import IMAGE_ONLY, Family, Text, default_of_call


def _velocity(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    output = model(
        noisy,
        encoder_hidden_states=text["encoder_hidden_states"],
        encoder_attention_mask=text.get("encoder_attention_mask"),
        timestep=sigmas * (1000.0 * model.config.timestep_scale),
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[1]]


def _encoded(pipeline: Any, text: str, device: torch.device) -> Text:
    tokens, mask, _, _ = pipeline.encode_prompt(
        text,
        do_classifier_free_guidance=False,
        device=device,
        max_sequence_length=default_of_call(pipeline, "max_sequence_length"),
        complex_human_instruction=default_of_call(pipeline, "complex_human_instruction"),
    )
    return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}


SANA = Family(
    name="sana",
    title="SANA",
    model_class="SanaTransformer2DModel",
    pipelines=("SanaPipeline",),
    lists={"transformer_blocks": IMAGE_ONLY},
    stem=("patch_embed", "time_embed", "caption_projection", "caption_norm"),
    head=("norm_out", "proj_out"),
    velocity=_velocity,
    encode_text=_encoded,
    encode_picture=lambda vae, pixels: vae.encode(pixels).latent * vae.config.scaling_factor,
    is_supported=lambda config: not config.guidance_embeds and config.patch_size == 1,
    cross_attention="attn2.to_out.0",
    patches=(512, 1024),
)

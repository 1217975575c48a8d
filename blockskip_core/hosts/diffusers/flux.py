"""FLUX.1 and FLUX.2 in diffusers: double-stream blocks, then single-stream blocks over text and image, text first.

Layout as of diffusers 0.42. FLUX.1's single blocks take text and image separately and join them inside; FLUX.2's take
one joined tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.token_places import ListLayout, TokenPlace
from .family import Family, Text, default_of_call, grid, packed, separate_streams, shifted_and_scaled, unpacked

GUIDANCE = 3.5
"""Of a FLUX.1 that embeds its guidance, if the text does not say; the pipeline's own default."""
GUIDANCE_2 = 4.0
"""The same of FLUX.2."""
STEPS_OF_MU = 50
"""FLUX.2's shift depends on the number of steps; this is its pipeline's default."""

_TEXT_OUTPUTS = ("attn.add_q_proj", "attn.to_add_out")


def _guidance(model: Any, text: Text, sigmas: Tensor, default: float) -> Tensor | None:
    """Return the guidance of every row, (B,), or None for models that embed none."""
    if not model.config.guidance_embeds:
        return None
    return text["guidance"] if "guidance" in text else torch.full_like(sigmas, default)


def _velocity(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    rows, columns = noisy.shape[-2:]
    num_text = text["encoder_hidden_states"].shape[1]
    output = model(
        hidden_states=packed(noisy),
        encoder_hidden_states=text["encoder_hidden_states"],
        pooled_projections=text["pooled_projections"],
        timestep=sigmas,
        img_ids=grid(1, rows // 2, columns // 2, device=noisy.device).to(noisy.dtype),
        txt_ids=torch.zeros(num_text, 3, device=noisy.device, dtype=noisy.dtype),
        guidance=_guidance(model, text, sigmas, GUIDANCE),
        return_dict=False,
    )[0]
    return unpacked(output, noisy)


def _encoded(pipeline: Any, text: str, device: torch.device) -> Text:
    length = default_of_call(pipeline, "max_sequence_length")
    tokens, pooled, _ = pipeline.encode_prompt(text, prompt_2=None, device=device, max_sequence_length=length)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


FLUX = Family(
    name="flux",
    title="FLUX.1",
    model_class="FluxTransformer2DModel",
    pipelines=("FluxPipeline",),
    lists={
        "transformer_blocks": separate_streams(*_TEXT_OUTPUTS, "ff_context.net.0.proj", "ff_context.net.2"),
        "single_transformer_blocks": separate_streams(),
    },
    stem=("x_embedder", "time_text_embed", "context_embedder"),
    head=("norm_out", "proj_out"),
    velocity=_velocity,
    encode_text=_encoded,
    encode_picture=shifted_and_scaled,
    channels=lambda config: config.in_channels // 4,
    is_supported=lambda config: config.out_channels in (None, config.in_channels),
    patch=2,
)


def _velocity_2(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    rows, columns = noisy.shape[-2:]
    num_text = text["encoder_hidden_states"].shape[1]
    output = model(
        hidden_states=noisy.flatten(2).mT,
        encoder_hidden_states=text["encoder_hidden_states"],
        timestep=sigmas,
        img_ids=grid(1, rows, columns, 1, device=noisy.device),
        txt_ids=grid(1, 1, 1, num_text, device=noisy.device),
        guidance=_guidance(model, text, sigmas, GUIDANCE_2),
        return_dict=False,
    )[0]
    return output.mT.unflatten(2, (rows, columns))


def _encoded_2(pipeline: Any, text: str, device: torch.device) -> Text:
    length = default_of_call(pipeline, "max_sequence_length")
    layers = default_of_call(pipeline, "text_encoder_out_layers")
    tokens, _ = pipeline.encode_prompt(text, device=device, max_sequence_length=length, text_encoder_out_layers=layers)
    return {"encoder_hidden_states": tokens}


def _encoded_picture_2(vae: Any, pixels: Tensor) -> Tensor:
    """Encode a picture; 2 x 2 cells of the VAE are one cell of the model, normalised channel by channel."""
    cells = torch.nn.functional.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
    mean, variance = (x.view(1, -1, 1, 1).to(cells) for x in (vae.bn.running_mean, vae.bn.running_var))
    return (cells - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)


def _mu_2(num_tokens: int) -> float:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(num_tokens, STEPS_OF_MU)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    model_class="Flux2Transformer2DModel",
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    lists={
        "transformer_blocks": separate_streams(*_TEXT_OUTPUTS, "ff_context.linear_in", "ff_context.linear_out"),
        "single_transformer_blocks": ListLayout(
            img=TokenPlace(("hidden_states",), None, 0), txt=None, joined="text first", container=None
        ),
    },
    stem=(
        "x_embedder",
        "time_guidance_embed",
        "context_embedder",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),  # fmt: skip
    head=("norm_out", "proj_out"),
    velocity=_velocity_2,
    encode_text=_encoded_2,
    encode_picture=_encoded_picture_2,
    vae_cells=2,
    mu=_mu_2,
)

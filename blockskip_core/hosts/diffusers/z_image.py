"""Z-Image in diffusers: refiners for text and image, then blocks over both together, image first.

Layout as of diffusers 0.42. The refiners come before the blocks and are never skipped. Both streams are padded with
learned tokens to multiples of 32. The model's time runs from 0 at pure noise to 1, and its output points to the picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.token_places import ListLayout, TokenPlace
from .family import Family, Text, default_of_call, shifted_and_scaled


def _velocity(model: Any, noisy: Tensor, sigmas: Tensor, text: Text) -> Tensor:
    pictures = list(noisy[:, :, None].unbind())
    output = model(pictures, (1000.0 - 1000.0 * sigmas) / 1000.0, list(text["cap_feats"].unbind()), return_dict=False)[
        0
    ]
    return -torch.stack(output)[:, :, 0]


def _encoded(pipeline: Any, text: str, device: torch.device) -> Text:
    length = default_of_call(pipeline, "max_sequence_length")
    [tokens], _ = pipeline.encode_prompt(
        text, device=device, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"cap_feats": tokens[None]}


Z_IMAGE = Family(
    name="lumina2",
    title="Z-Image",
    model_class="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline",),
    lists={"layers": ListLayout(img=TokenPlace((0,), None, 0), txt=None, joined="image first", container=None)},
    stem=("t_embedder", "all_x_embedder", "cap_embedder", "noise_refiner", "context_refiner"),
    head=("all_final_layer",),
    velocity=_velocity,
    encode_text=_encoded,
    encode_picture=shifted_and_scaled,
    is_supported=lambda config: config.siglip_feat_dim is None and list(config.all_patch_size) == [2],
    text_key="cap_feats",
    patch=2,
    padding=32,
    tables=("rope_embedder",),
)

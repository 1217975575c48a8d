"""Qwen-Image: double-stream blocks only, text first in the joint attention.

Layout of ``comfy.ldm.qwen_image.model.QwenImageTransformer2DModel`` as of ComfyUI 0.18 to 0.30.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.qwen_image.model

from ...model import BlockInfo, TokenStreams
from .base import FamilyAdapter, block_info
from .capabilities import EmbedsPatches, MasksText, PlacesTokens
from .patch_layers import PatchLayers
from .reference_tokens import WithReferences
from .text_masking import mask_by_index, wrap_options
from .token_positions import RotaryPositions, TokenPositions, centred_tokens


class QwenBlockIO:
    """``block(hidden_states=, encoder_hidden_states=, ...) -> (text, image)``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(kwargs["hidden_states"], kwargs["encoder_hidden_states"])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        txt, img = result
        return TokenStreams(img, txt)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.txt, streams.img


class QwenImageAdapter(FamilyAdapter, MasksText, PlacesTokens, EmbedsPatches):
    """Qwen-Image and Qwen-Image-Edit."""

    family = "qwen_image"
    title = "Qwen-Image"
    stem = ("time_text_embed", "txt_norm", "img_in", "txt_in")
    trainable_head = ("norm_out", "proj_out")
    attention_layers = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    mlp_layers = ("mlp.net.0.proj", "mlp.net.2")
    text_output_layers = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    text_entry = "txt_in"
    architecture = "Qwen-Image"
    base_model_version = "qwen_image"
    read_by_diffusers = frozenset({"diffusers", "peft", "kohya"})
    has_names_of_diffusers = False
    takes_references = True

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        return type(diffusion_model) is comfy.ldm.qwen_image.model.QwenImageTransformer2DModel

    def blocks(self) -> Sequence[BlockInfo]:
        return block_info(self._model, "transformer_blocks", WithReferences(QwenBlockIO()))

    @property
    def width(self) -> int:
        return self._model.inner_dim

    def token_positions(self) -> TokenPositions:
        return RotaryPositions(self._model.pe_embedder, centred_tokens, stretched=False)

    def patch_layers(self) -> PatchLayers:
        return PatchLayers("img_in", "proj_out")

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        def masked(options: Mapping[str, Any]) -> bool:
            return options["block_index"] in blocks

        return wrap_options(lambda options, num_text: mask_by_index(options, masked, num_text))

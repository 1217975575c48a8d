"""SD3.5: double-stream blocks, text first in the joint attention; the last block has no text output.

Layout of ``comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper`` as of ComfyUI 0.18 to 0.30. Some
blocks of SD3.5-Medium have a second attention, among image tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.ldm.modules.diffusionmodules.mmdit
from torch import Tensor

from ...errors import UnsupportedModelError
from ...model import BlockInfo, TokenStreams
from ...selection.masked_attention import attend_without_text
from .base import FamilyAdapter, block_info
from .capabilities import EmbedsPatches, MasksText, PlacesTokens
from .patch_layers import PatchLayers
from .text_masking import mask_by_block, wrap_options
from .token_positions import TablePositions, TokenPositions


class JointBlockIO:
    """``block(text, image, c=, ...) -> (text or None, image)``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        txt, img = args
        return TokenStreams(img, txt)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        txt, img = result
        return TokenStreams(img, txt)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.txt, streams.img


class Sd3Adapter(FamilyAdapter, MasksText, PlacesTokens, EmbedsPatches):
    """SD3.5 (Large and Medium), and SD3, which has the same class."""

    family = "sd3"
    title = "SD3.5"
    stem = ("x_embedder", "t_embedder", "y_embedder", "context_processor", "context_embedder")
    trainable_head = ("final_layer",)
    attention_layers = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj")
    mlp_layers = ("mlp.fc1", "mlp.fc2")
    text_output_layers = ("context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2")
    text_entry = "context_embedder"
    architecture = "stable-diffusion-3"
    base_model_version = "sd3"
    read_by_diffusers = frozenset({"diffusers"})
    pooled_entry = "y_embedder.mlp.0"

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        return type(diffusion_model) is comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper

    def blocks(self) -> Sequence[BlockInfo]:
        return block_info(self._model, "joint_blocks", JointBlockIO())

    def token_positions(self) -> TokenPositions:
        side = self._model.pos_embed_max_size
        if self._model.pos_embed is None or side is None:
            raise UnsupportedModelError(
                "This model computes positions from the size of the picture and has no table of them, so tokens of two "
                "sizes cannot be placed. Load SD3 or SD3.5."
            )
        return TablePositions("diffusion_model.cropped_pos_embed", self.patch_size, side)

    def patch_layers(self) -> PatchLayers:
        return PatchLayers("x_embedder", "final_layer.linear")

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        return wrap_options(lambda options, _: mask_by_block(options, blocks, _joint_attention_masked))


def _joint_attention_masked(block: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Return an attention override for one call of a block."""
    num_text = block["txt"].shape[1]
    return partial(_masked_if_joint, num_text_tokens=num_text, num_tokens=num_text + block["img"].shape[1])


def _masked_if_joint(
    attention: Callable[..., Tensor],
    q: Tensor,
    *args: Any,
    num_text_tokens: int,
    num_tokens: int,
    **kwargs: Any,
) -> Tensor:
    if q.shape[1] != num_tokens:  # attention among image tokens only
        return attention(q, *args, **kwargs)
    return attend_without_text(attention, q, *args, num_text_tokens=num_text_tokens, **kwargs)

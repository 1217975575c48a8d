"""Wan 2.1 and 2.2, text to video, for pictures and clips: image tokens only, which see the text by cross attention.

Layout of ``comfy.ldm.wan.model.WanModel`` as of ComfyUI 0.18 to 0.30. The text is not part of the stream: every block
gets the same embedded text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.wan.model
from torch import Tensor

from ...model import BlockInfo, TokenStreams
from .base import FamilyAdapter, block_info
from .capabilities import EmbedsPatches, MasksText, PlacesTokens
from .patch_layers import PatchLayers
from .text_masking import mask_by_block, without_cross_attention, wrap_options
from .token_positions import RotaryPositions, TokenPositions, last_tokens


class WanBlockIO:
    """``block(x, e=, freqs=, context=, ...) -> x``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(args[0])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(result)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.img


class WanAdapter(FamilyAdapter, MasksText, PlacesTokens, EmbedsPatches):
    """Wan 2.1 and 2.2, text to video."""

    family = "wan"
    title = "Wan 2.1 and 2.2 (text to video)"
    stem = ("patch_embedding", "time_embedding", "time_projection", "text_embedding")
    trainable_head = ("head",)
    attention_layers = ("attn.q", "attn.k", "attn.v", "attn.o")
    mlp_layers = ("ffn.0", "ffn.2")
    text_entry = "text_embedding.0"
    architecture = "wan2.1"
    base_model_version = "wan2.1"
    read_by_diffusers = frozenset({"diffusers", "peft"})
    has_names_of_diffusers = False

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Exclude the variants that take pictures, sound or control videos."""
        return (
            type(diffusion_model) is comfy.ldm.wan.model.WanModel
            and diffusion_model.model_type == "t2v"
            and diffusion_model.in_dim == diffusion_model.out_dim
            and diffusion_model.ref_conv is None
        )

    def blocks(self) -> Sequence[BlockInfo]:
        return block_info(self._model, "blocks", WanBlockIO())

    @property
    def patch_size(self) -> int:
        return self._model.patch_size[-1]

    @property
    def width(self) -> int:
        return self._model.dim

    def text_tokens(self, text_length: int) -> int:
        return 0

    def token_positions(self) -> TokenPositions:
        return RotaryPositions(self._model.rope_embedder, last_tokens, stretched=True)

    def patch_layers(self) -> PatchLayers:
        return PatchLayers("patch_embedding", "head.head", clips=True)

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        return wrap_options(lambda options, _: mask_by_block(options, blocks, lambda args: _SecondCallReturnsNothing()))


class _SecondCallReturnsNothing:
    """Attention override for one block, whose first call is self attention and whose second is to the text."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._calls += 1
        return attention(*args, **kwargs) if self._calls == 1 else without_cross_attention(attention, *args, **kwargs)

"""Z-Image and Lumina 2: separate refiners for text and image, then blocks over both together, text first.

Layout of ``comfy.ldm.lumina.model.NextDiT`` as of ComfyUI 0.18 to 0.30. The refiners come before the blocks and are
never skipped. Z-Image pads both text and image with learned tokens to multiples of 32; these are part of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.lumina.model
from torch import Tensor

from ...model import BlockInfo
from .base import TEXT_TOKENS, FamilyAdapter, JoinedBlockIO, block_info
from .capabilities import EmbedsPatches, MasksText, PlacesTokens
from .patch_layers import PatchLayers
from .text_masking import mask_by_index, wrap_options
from .token_positions import RotaryPositions, TokenPositions, first_tokens_of_image


class Lumina2Adapter(FamilyAdapter, MasksText, PlacesTokens, EmbedsPatches):
    """Z-Image and Lumina 2, text to image."""

    family = "lumina2"
    title = "Z-Image and Lumina 2"
    stem = ("x_embedder", "t_embedder", "cap_embedder")
    trainable_head = ("final_layer",)
    attention_layers = ("attention.qkv", "attention.out")
    mlp_layers = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    text_entry = "cap_embedder.1"

    def __init__(self, diffusion_model: Any) -> None:
        super().__init__(diffusion_model)
        if self._model.pad_tokens_multiple:  # Z-Image has it, Lumina 2 does not
            self.architecture = self.base_model_version = "z-image"
        else:
            self.architecture, self.base_model_version = "lumina-2", "lumina2"
            self.read_by_diffusers, self.has_names_of_diffusers = frozenset(), False

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Exclude the variants that take more than text: a pooled vector (NewBie) or pictures (omni)."""
        return (
            type(diffusion_model) is comfy.ldm.lumina.model.NextDiT
            and getattr(diffusion_model, "clip_text_pooled_proj", None) is None
            and getattr(diffusion_model, "siglip_embedder", None) is None
        )

    def blocks(self) -> Sequence[BlockInfo]:
        return block_info(self._model, "layers", JoinedBlockIO(lambda options: options[TEXT_TOKENS]))

    @property
    def frozen_stem(self) -> Sequence[str]:
        refiners = [
            f"{name}.{index}"
            for name in ("noise_refiner", "context_refiner")
            for index in range(len(getattr(self._model, name)))
        ]
        return [*super().frozen_stem, *refiners]

    @property
    def width(self) -> int:
        return self._model.dim

    def image_tokens(self, rows: int, columns: int) -> int:
        return self._padded(super().image_tokens(rows, columns))

    def text_tokens(self, text_length: int) -> int:
        return self._padded(text_length)

    def _padded(self, tokens: int) -> int:
        multiple = self._model.pad_tokens_multiple or 1
        return -(-tokens // multiple) * multiple

    def token_positions(self) -> TokenPositions:
        return RotaryPositions(self._model.rope_embedder, first_tokens_of_image, stretched=True)

    def patch_layers(self) -> PatchLayers:
        def image_tokens(tokens: Tensor, number: int) -> Tensor:
            first = tokens.shape[1] - self._padded(number)  # text first, and the padding of the image last
            return tokens[:, first : first + number]

        refiners = tuple(f"noise_refiner.{index}" for index in range(len(self._model.noise_refiner)))
        return PatchLayers("x_embedder", "final_layer.linear", image_tokens, refiners)

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        def masked(options: Mapping[str, Any]) -> bool:
            return options.get("block_index") in blocks  # the refiners run before there is an index

        return wrap_options(lambda options, length: mask_by_index(options, masked, self.text_tokens(length)))

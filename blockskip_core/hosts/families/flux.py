"""FLUX.1, FLUX.2 and Chroma: double-stream blocks, then single-stream blocks over text and image tokens, text first.

Layout of ``comfy.ldm.flux.model.Flux`` and ``comfy.ldm.chroma.model.Chroma`` as of ComfyUI 0.18 to 0.30. The three
differ in where the modulation comes from: in FLUX.1 every block has its own; in FLUX.2 (dev and Klein) all blocks
share it; in Chroma one network computes it for every block. In the latter two it is computed before the first block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import comfy.ldm.chroma.model
import comfy.ldm.flux.model

from ...model import BlockInfo, BlockIO, TokenStreams
from .base import FamilyAdapter, JoinedBlockIO, block_info
from .capabilities import EmbedsPatches, MasksText, PlacesTokens
from .patch_layers import PatchLayers
from .reference_tokens import WithReferences
from .text_masking import mask_by_index, wrap_options
from .token_positions import RotaryPositions, TokenPositions, last_tokens


class DoubleBlockIO:
    """``block(img=, txt=, vec=, pe=, ...) -> (img, txt)``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(kwargs["img"], kwargs["txt"])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(*result)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.img, streams.txt


class FluxAdapter(FamilyAdapter, MasksText, PlacesTokens, EmbedsPatches):
    """FLUX.1 (dev, schnell and Kontext)."""

    family = "flux"
    title = "FLUX.1"
    stem: ClassVar[tuple[str, ...]] = ("img_in", "time_in", "guidance_in", "vector_in", "txt_in")
    trainable_head = ("final_layer",)
    attention_layers = ("attn.qkv", "attn.proj", "linear1", "linear2")  # single blocks fuse attention and MLP in two
    mlp_layers = ("mlp.0", "mlp.2", "linear1", "linear2")
    text_output_layers = ("txt_attn.proj", "txt_mlp.0", "txt_mlp.2")
    reads_rope_options = True  # whether the host's options to stretch and shift positions apply
    text_entry = "txt_in"
    pooled_entry = "vector_in.in_layer"
    base_model_version = "flux1"
    takes_references = True

    @property
    def architecture(self) -> str:  # type: ignore[override]
        return "flux-1-dev" if self._model.params.guidance_embed else "flux-1-schnell"

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Exclude other users of the class: FLUX.2 (below), and Ovis and LongCat, whose text and layers differ."""
        return _is_flux(diffusion_model) and not any(
            getattr(diffusion_model.params, name)
            for name in ("global_modulation", "yak_mlp", "txt_norm", "txt_ids_dims")
        )

    def blocks(self) -> Sequence[BlockInfo]:
        double: BlockIO = DoubleBlockIO()
        single: BlockIO = JoinedBlockIO(lambda options: options["img_slice"][0])
        if self.takes_references:
            double, single = WithReferences(double), WithReferences(single)
        return [
            *block_info(self._model, "double_blocks", double),
            *block_info(self._model, "single_blocks", single),
        ]

    def token_positions(self) -> TokenPositions:
        return RotaryPositions(self._model.pe_embedder, last_tokens, stretched=self.reads_rope_options)

    def patch_layers(self) -> PatchLayers:
        return PatchLayers("img_in", "final_layer.linear")

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        offsets = {"double": 0, "single": len(self._model.double_blocks)}

        def masked(options: Mapping[str, Any]) -> bool:
            return options["block_index"] + offsets[options["block_type"]] in blocks

        return wrap_options(lambda options, num_text: mask_by_index(options, masked, num_text))


class Flux2Adapter(FluxAdapter):
    """FLUX.2 (dev and Klein)."""

    family = "flux2"
    title = "FLUX.2"
    stem = (
        "img_in", "time_in", "guidance_in", "txt_in", "double_stream_modulation_img", "double_stream_modulation_txt",
        "single_stream_modulation",
    )  # fmt: skip
    architecture = "flux-2"
    base_model_version = "flux2"
    read_by_diffusers = frozenset({"diffusers", "peft", "kohya"})
    has_names_of_diffusers = False

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        return _is_flux(diffusion_model) and diffusion_model.params.global_modulation


class ChromaAdapter(FluxAdapter):
    """Chroma (not Radiance, which works on pixels)."""

    family = "chroma"
    title = "Chroma"
    stem = ("img_in", "txt_in", "distilled_guidance_layer")
    architecture = "chroma"
    base_model_version = "chroma"
    reads_rope_options = False
    takes_references = False  # the class is given them, and does not read them

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        return type(diffusion_model) is comfy.ldm.chroma.model.Chroma


def _is_flux(diffusion_model: Any) -> bool:
    return type(diffusion_model) is comfy.ldm.flux.model.Flux

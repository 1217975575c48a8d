"""Token positions of every family that can be sampled with tokens of two sizes.

These are families with a file of their own (``ADAPTERS``) and those listed here, which need nothing else. Classes are
given by name, because older hosts do not have all of them. Layouts as of ComfyUI 0.30.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedModelError
from .capabilities import PlacesTokens, require
from .registry import ADAPTERS
from .token_positions import (
    AddedTablePositions,
    RotaryPositions,
    TokenPositions,
    first_tokens,
    first_tokens_around_middle,
    last_tokens,
    last_tokens_around_middle,
)


@dataclass(frozen=True)
class SampledFamily:
    """A family without a file of its own; for training most are followed.

    Attributes:
        title: Name shown to users.
        of: Module and class of the host.
        positions: Model -> how its tokens get their positions.
        patch: Model -> side of a token in latent cells.
        fits: Model -> whether it is this variant, where several share the class.
    """

    title: str
    of: str
    positions: Callable[[Any], TokenPositions]
    patch: Callable[[Any], int]
    fits: Callable[[Any], bool] = lambda model: True


def _is_hunyuan_image(model: Any) -> bool:
    """Exclude the video models, and the refiner, which takes a picture."""
    return len(model.patch_size) == 2 and model.in_channels == model.out_channels


def _is_ovis(model: Any) -> bool:
    """Exclude LongCat-Image, which shifts its positions where a wrapper cannot see it."""
    return model.params.yak_mlp and model.params.txt_norm


SAMPLED_ONLY: tuple[SampledFamily, ...] = (
    SampledFamily(
        title="HiDream-I1",
        of="comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",
        positions=lambda model: RotaryPositions(model.pe_embedder, first_tokens, stretched=False),
        patch=lambda model: model.patch_size,
    ),
    SampledFamily(
        title="Krea 2",
        of="comfy.ldm.krea2.model.SingleStreamDiT",
        positions=lambda model: RotaryPositions(model.pe_embedder, last_tokens, stretched=False),
        patch=lambda model: model.patch,
    ),
    SampledFamily(
        title="HunyuanImage 2.1",
        of="comfy.ldm.hunyuan_video.model.HunyuanVideo",
        positions=lambda model: RotaryPositions(model.pe_embedder, last_tokens, stretched=False),
        patch=lambda model: model.patch_size[-1],
        fits=_is_hunyuan_image,
    ),
    SampledFamily(
        title="OmniGen2",
        of="comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",
        positions=lambda model: RotaryPositions(model.rope_embedder.rope_embedder, last_tokens, stretched=False),
        patch=lambda model: model.patch_size,
    ),
    SampledFamily(
        title="Ernie-Image",
        of="comfy.ldm.ernie.model.ErnieImageModel",
        positions=lambda model: RotaryPositions(model.pos_embed, first_tokens, stretched=True),
        patch=lambda model: model.patch_size,
    ),
    SampledFamily(
        title="Boogu",
        of="comfy.ldm.boogu.model.BooguTransformer2DModel",
        positions=lambda model: RotaryPositions(model.rope_embedder.rope_embedder, last_tokens, stretched=False),
        patch=lambda model: model.patch_size,
    ),
    SampledFamily(
        title="Lens",
        of="comfy.ldm.lens.model.LensTransformer2DModel",
        positions=lambda model: RotaryPositions(model.pos_embed, first_tokens_around_middle, stretched=False),
        patch=lambda model: 1,
    ),
    SampledFamily(
        title="Mage-Flow",
        of="comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",
        positions=lambda model: RotaryPositions(model.pe_embedder, last_tokens_around_middle, stretched=False),
        patch=lambda model: 1,
    ),
    SampledFamily(
        title="Kandinsky 5 (picture)",
        of="comfy.ldm.kandinsky5.model.Kandinsky5",
        positions=lambda model: RotaryPositions(model.rope_embedder_3d, last_tokens, stretched=True),
        patch=lambda model: model.patch_size[-1],
        fits=lambda model: tuple(model.rope_scale_factor) == (1.0, 1.0, 1.0) and model.model_dim != 4096,
    ),
    SampledFamily(
        title="HunyuanVideo",
        of="comfy.ldm.hunyuan_video.model.HunyuanVideo",
        positions=lambda model: RotaryPositions(model.pe_embedder, last_tokens, stretched=False),
        patch=lambda model: model.patch_size[-1],
        fits=lambda model: len(model.patch_size) == 3 and model.in_channels == model.out_channels,
    ),
    SampledFamily(
        title="AuraFlow",
        of="comfy.ldm.aura.mmdit.MMDiT",
        positions=lambda model: AddedTablePositions(
            "diffusion_model.apply_pos_embeds", model.patch_size, model.h_max, model.positional_encoding.shape[-1]
        ),
        patch=lambda model: model.patch_size,
    ),
    SampledFamily(
        title="Ovis-Image",
        of="comfy.ldm.flux.model.Flux",
        positions=lambda model: RotaryPositions(model.pe_embedder, last_tokens, stretched=True),
        patch=lambda model: model.patch_size,
        fits=_is_ovis,
    ),
)


def positions_of(patcher: Any) -> tuple[TokenPositions, int]:
    """Return how a MODEL's tokens get their positions, and the side of a token in latent cells.

    Raises:
        UnsupportedModelError: If the model is of no such family (the message names them), or its positions cannot be
            set.
    """
    model = patcher.model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(model):
            adapted = adapter(model)
            placing = require(adapted, PlacesTokens, "Use KSampler.")
            return placing.token_positions(), adapted.patch_size
    kind = f"{type(model).__module__}.{type(model).__name__}"
    for family in SAMPLED_ONLY:
        if family.of == kind and family.fits(model):
            return family.positions(model), family.patch(model)
    known = ", ".join([*(family.title for family in ADAPTERS), *(family.title for family in SAMPLED_ONLY)])
    raise UnsupportedModelError(
        f"Expected a model whose token positions can be set ({known}), got {type(model).__name__}. Load one of these, "
        "or use KSampler."
    )

"""How tokens get their positions, for every family that can be sampled with tokens of two sizes.

That is every family that can be trained (``ADAPTERS``), and those here, which need nothing else. Classes are named and
not imported, because older hosts do not have all of them. Layouts as of ComfyUI 0.30.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UnsupportedModelError
from .capabilities import PlacesTokens, require
from .registry import ADAPTERS
from .token_positions import RotaryPositions, TokenPositions, first_tokens, last_tokens


@dataclass(frozen=True)
class SampledFamily:
    """A family that is sampled only.

    Attributes:
        title: Name for people.
        of: Module and class of the host.
        positions: Of a model of it.
        patch: Side of a token in latent cells.
        fits: Tells variants apart that share the class.
    """

    title: str
    of: str
    positions: Callable[[Any], TokenPositions]
    patch: Callable[[Any], int]
    fits: Callable[[Any], bool] = lambda model: True


def _is_hunyuan_image(model: Any) -> bool:
    """Not the videos, nor the refiner, which is given a picture."""
    return len(model.patch_size) == 2 and model.in_channels == model.out_channels


def _is_ovis(model: Any) -> bool:
    """Not LongCat-Image, which moves its positions where a wrapper does not see it."""
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
        UnsupportedModelError: If the model's family is none of these, naming those there are, or has no places to tell.
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

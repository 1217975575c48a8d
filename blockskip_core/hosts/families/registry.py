"""The families that can be trained, and the adapter for a MODEL."""

from __future__ import annotations

from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.model_sampling

from ...errors import UnsupportedModelError
from .base import FamilyAdapter
from .flux import ChromaAdapter, Flux2Adapter, FluxAdapter
from .followed import FollowedAdapter
from .lumina2 import Lumina2Adapter
from .minimax import MiniMaxAdapter
from .qwen_image import QwenImageAdapter
from .sd3 import Sd3Adapter
from .wan import WanAdapter

ADAPTERS: tuple[type[FamilyAdapter], ...] = (
    FluxAdapter,
    Flux2Adapter,
    QwenImageAdapter,
    Lumina2Adapter,
    WanAdapter,
    ChromaAdapter,
    Sd3Adapter,
    MiniMaxAdapter,
)
CLASSES_WITH_A_FILE = (
    comfy.ldm.flux.model.Flux,
    comfy.ldm.chroma.model.Chroma,
    comfy.ldm.qwen_image.model.QwenImageTransformer2DModel,
    comfy.ldm.lumina.model.NextDiT,
    comfy.ldm.wan.model.WanModel,
)


def adapter_for(patcher: Any) -> FamilyAdapter:
    """Return the adapter of the family that a MODEL belongs to.

    A model without a file of its own gets a :class:`FollowedAdapter`, whose layout is found when it first runs.

    Raises:
        UnsupportedModelError: If there is none; the message names the supported families.
    """
    model = patcher.model
    diffusion_model = model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(diffusion_model):
            return adapter(diffusion_model)
    if can_be_followed(model):
        return FollowedAdapter(diffusion_model, type(model.model_config).__name__)
    known = ", ".join(adapter.title for adapter in ADAPTERS)
    raise UnsupportedModelError(
        f"Expected a diffusion transformer of a supported family ({known}), got {type(diffusion_model).__name__}. "
        "Load one of these with Load Diffusion Model."
    )


def can_be_followed(model: Any) -> bool:
    """Return whether the layout of a host's model may be found by following it.

    Excluded are other ways of adding noise than flow matching, for which the training's loss would be wrong; models of sound;
    and the variants of families with a file of their own that are given more than a text, which would be trained without it.
    """
    diffusion_model = model.diffusion_model
    if isinstance(diffusion_model, CLASSES_WITH_A_FILE) or not FollowedAdapter.matches(diffusion_model):
        return False
    flow = isinstance(model.model_sampling, comfy.model_sampling.CONST)
    return flow and model.latent_format.latent_dimensions in (2, 3)

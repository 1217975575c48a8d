"""The families that can be trained, and the adapter for a MODEL."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from .base import FamilyAdapter
from .flux import ChromaAdapter, Flux2Adapter, FluxAdapter
from .lumina2 import Lumina2Adapter
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
)


def adapter_for(patcher: Any) -> FamilyAdapter:
    """Return the adapter of the family that a MODEL belongs to.

    Raises:
        UnsupportedModelError: If there is none; the message names the supported families.
    """
    diffusion_model = patcher.model.diffusion_model
    for adapter in ADAPTERS:
        if adapter.matches(diffusion_model):
            return adapter(diffusion_model)
    known = ", ".join(adapter.title for adapter in ADAPTERS)
    raise UnsupportedModelError(
        f"Expected a diffusion transformer of a supported family ({known}), got {type(diffusion_model).__name__}. "
        "Load one of these with Load Diffusion Model."
    )

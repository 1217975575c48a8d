"""The families that can be trained with diffusers, and which of them a transformer or a pipeline belongs to."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from .family import Family
from .flux import FLUX, FLUX2
from .qwen_image import QWEN_IMAGE
from .sana import SANA
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE, WAN, SANA)


def family_of(transformer: Any) -> Family:
    """Return the family of a transformer.

    Raises:
        UnsupportedModelError: If it is of another class, or a variant that takes more than a text.
    """
    name = type(transformer).__name__
    family = next((family for family in FAMILIES if family.model_class == name), None)
    if family is None:
        known = ", ".join(family.model_class for family in FAMILIES)
        raise UnsupportedModelError(f"Expected a transformer of one of diffusers' classes {known}, got {name}.")
    if not family.is_supported(transformer.config):
        raise UnsupportedModelError(
            f"This {name} takes more than a text, or is distilled in a way that training cannot follow. Load one that makes "
            "pictures from text."
        )
    return family


def family_of_pipeline(name: Any) -> Family:
    """Return the family of a pipeline's class.

    Raises:
        UnsupportedModelError: If there is none.
    """
    family = next((family for family in FAMILIES if name in family.pipelines), None)
    if family is None:
        known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
        raise UnsupportedModelError(f"Expected one of diffusers' pipelines {known}, got {name}.")
    return family

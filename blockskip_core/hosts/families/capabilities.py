"""Optional capabilities of a family's adapter; each is a class that the adapter derives from.

A family can be trained as soon as its blocks are known. Anything else is requested where it is used
(:func:`require`), so an adapter that only knows the blocks is complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import UnsupportedModelError
from .base import FamilyAdapter
from .patch_layers import PatchLayers
from .token_positions import TokenPositions


class MasksText(ABC):
    """The text can be hidden from some blocks, so a selection can be measured (Select Blocks)."""

    @abstractmethod
    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        """Return an APPLY_MODEL wrapper under which image tokens of these blocks cannot see the text."""


class PlacesTokens(ABC):
    """Image tokens can be given positions, so latents with tokens of two sizes can be sampled (RALU)."""

    @abstractmethod
    def token_positions(self) -> TokenPositions:
        """Return how image tokens get their positions."""


class EmbedsPatches(ABC):
    """The layers that take patches in and give them back are known, so patches of another size can be used (DDiT)."""

    @abstractmethod
    def patch_layers(self) -> PatchLayers:
        """Return where patches enter the model and leave it."""


Capability = TypeVar("Capability", MasksText, PlacesTokens, EmbedsPatches)


def require(adapter: FamilyAdapter, capability: type[Capability], advice: str) -> Capability:
    """Return ``adapter``, which must have a capability.

    Args:
        adapter: A family's.
        capability: One of the classes of this module.
        advice: What to do instead, one sentence.

    Raises:
        UnsupportedModelError: If the family lacks it.
    """
    if not isinstance(adapter, capability):
        lacking = {
            MasksText: "hiding the text from blocks",
            PlacesTokens: "tokens of two sizes",
            EmbedsPatches: "patches of another size",
        }[capability]
        raise UnsupportedModelError(f"{adapter.title} models are not supported for {lacking}. {advice}")
    return adapter

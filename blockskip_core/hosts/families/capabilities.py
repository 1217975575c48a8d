"""What a family's adapter may be able to do besides naming its blocks; each is a class, which an adapter derives from.

A family is trained as soon as its blocks are known. Whatever else it offers is asked for where it is used
(:func:`require`), so an adapter that knows nothing but the blocks is a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import UnsupportedModelError
from .base import FamilyAdapter
from .token_positions import TokenPositions


class MasksText(ABC):
    """The text can be hidden from some blocks, so a selection can be measured (Select Blocks)."""

    @abstractmethod
    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        """Return an APPLY_MODEL wrapper under which image tokens of these blocks cannot see the text."""


class PlacesTokens(ABC):
    """Image tokens can be told their places, so latents with tokens of two sizes can be sampled (RALU)."""

    @abstractmethod
    def token_positions(self) -> TokenPositions:
        """Return how image tokens are told their places."""


Capability = TypeVar("Capability", MasksText, PlacesTokens)


def require(adapter: FamilyAdapter, capability: type[Capability], advice: str) -> Capability:
    """Return ``adapter`` as one that has a capability.

    Args:
        adapter: A family's.
        capability: One of the classes of this module.
        advice: What to do instead, one sentence.

    Raises:
        UnsupportedModelError: If the family lacks it.
    """
    if not isinstance(adapter, capability):
        lacking = {MasksText: "hiding the text from blocks", PlacesTokens: "tokens of two sizes"}[capability]
        raise UnsupportedModelError(f"{adapter.title} models are not supported for {lacking}. {advice}")
    return adapter

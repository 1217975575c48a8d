"""What this package must know of a family of diffusion transformers. One file per family, nothing elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from ..lora import LoraTargets
from ..streams import BlockInfo, BlockIO
from ..weight_formats import stored_bytes


class FamilyAdapter(Protocol):
    """A family's blocks, tokens and layers, as its ComfyUI class lays them out.

    Attributes:
        family: Short name, kept in files.
        title: Name for people.
        frozen_stem: Modules before the first block.
        trainable_head: Modules after the last block.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    frozen_stem: ClassVar[Sequence[str]]
    trainable_head: ClassVar[Sequence[str]]

    def __init__(self, diffusion_model: nn.Module) -> None: ...

    @classmethod
    def matches(cls, diffusion_model: nn.Module) -> bool:
        """Return whether the model is of this family."""
        ...

    def blocks(self) -> Sequence[BlockInfo]:
        """Return all blocks in execution order."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a token in latent cells."""
        ...

    @property
    def width(self) -> int:
        """Width of a token."""
        ...

    def is_lora_target(self, name: str, targets: LoraTargets) -> bool:
        """Return whether the linear layer of this native name gets an adapter."""
        ...

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        """Return a DIFFUSION_MODEL wrapper under which image tokens of these blocks cannot see the text."""
        ...


def block_info(diffusion_model: nn.Module, list_name: str, io: BlockIO) -> list[BlockInfo]:
    """Return the blocks of one module list."""
    infos = []
    for index, block in enumerate(getattr(diffusion_model, list_name)):
        parameters = list(block.parameters())
        infos.append(
            BlockInfo(
                name=f"{list_name}.{index}",
                io=io,
                num_parameters=sum(math.prod(p.shape) for p in parameters),  # packed formats have fewer elements
                num_bytes=sum(stored_bytes(p) for p in parameters),
            )
        )
    return infos

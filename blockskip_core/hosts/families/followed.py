"""Diffusion transformers without a file of their own, whose layout was found by following a few calls of the model.

What is found is a :class:`ModelLayout`; ``models.following`` finds it. A family file remains necessary where a model pads
its tokens, or is sampled with tokens of two sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from ...adapters.layer_kinds import is_of_kind
from ...adapters.lora import LoraTargets
from ...adapters.lora_formats import LoraFileFormat
from ...blocks.token_places import ListLayout, PlacedBlockIO
from ...errors import UnsupportedModelError
from ...model import BlockInfo, CopiedCall, TokenStreams
from .base import FamilyAdapter, block_info
from .block_lists import block_lists
from .capabilities import MasksText
from .hidden_text import TextKeys, hide_text

READ_BY_DIFFUSERS = ("LTXV", "LTXAV", "Krea2", "ErnieImage", "HiDream", "Anima")
"""The host's classes whose layers diffusers 0.42.1 knows by the host's names."""
FORMS_WITH_NAMES: frozenset[LoraFileFormat] = frozenset({"diffusers", "peft"})


@dataclass(frozen=True)
class ModelLayout:
    """Everything about a model that only a call shows.

    Attributes:
        lists: Path of a list of blocks -> its layout.
        stem, head: Modules before the first and after the last block; those between blocks count as head.
        width: Width of a token.
        patch_size: Side of a token in latent cells.
        text_keys: Path of a list -> where the text is among the keys of a block's attention calls, in order; a list whose
            attention was not seen has none.
        more_text: Text tokens in the stream minus those that the model is given; None if text is not in the stream.
    """

    lists: Mapping[str, ListLayout]
    stem: tuple[str, ...]
    head: tuple[str, ...]
    width: int
    patch_size: int
    text_keys: Mapping[str, tuple[TextKeys, ...]]
    more_text: int | None


class FollowedAdapter(FamilyAdapter, MasksText):
    """A model of any class, once its layout is known; until then, only its blocks.

    Attributes:
        layout: What following the model has found.
    """

    stem: ClassVar[tuple[str, ...]] = ()
    attention_layers = mlp_layers = ()
    text_entry = ""
    has_names_of_diffusers = False
    # Qwen-Image 2.1 keeps keys and values of its text, which other blocks would not reproduce (ComfyUI from 0.37 on)
    call_options = MappingProxyType({"qwen_image21_cache": {"device": "off"}})

    def __init__(self, diffusion_model: nn.Module, name: str) -> None:
        super().__init__(diffusion_model)
        self.title = name  # type: ignore[misc]  # of the model's class, so not the adapter's
        self.family = re.sub(r"\W+", "_", name).lower()  # type: ignore[misc]
        self.architecture = self.base_model_version = self.family
        self.read_by_diffusers = FORMS_WITH_NAMES if name in READ_BY_DIFFUSERS else frozenset()
        self.layout: ModelLayout | None = None
        self.takes_references = "ref_latents" in signature(diffusion_model.forward).parameters  # the host's own name
        self._num_img = self._num_references = 0

    @classmethod
    def matches(cls, diffusion_model: Any) -> bool:
        """Return whether the model has lists of blocks."""
        return bool(block_lists(diffusion_model))

    def prepare_call(self, frames: int, rows: int, columns: int, references: int = 0) -> None:
        self._num_img, self._num_references = frames * self.image_tokens(rows, columns), references

    def block_io(self, name: str) -> PlacedBlockIO:
        """Return the IO of a list's blocks for the current call."""
        return PlacedBlockIO(self.found.lists[name], lambda: self._num_img, lambda: self._num_references)

    @property
    def found(self) -> ModelLayout:
        """The layout."""
        assert self.layout is not None, "the model has not been followed yet"
        return self.layout

    def blocks(self) -> Sequence[BlockInfo]:
        return [
            info
            for name in block_lists(self._model)
            for info in block_info(self._model, name, _LaterBlockIO(self, name))
        ]

    @property
    def frozen_stem(self) -> Sequence[str]:
        return self.found.stem

    @property
    def trainable_head(self) -> Sequence[str]:  # type: ignore[override]
        return self.found.head

    @property
    def patch_size(self) -> int:
        return self.found.patch_size

    def image_tokens(self, rows: int, columns: int) -> int:
        if self.layout is None:  # nothing asks for it while the model is followed
            return 0
        return super().image_tokens(rows, columns)

    @property
    def width(self) -> int:
        return self.found.width

    def text_tokens(self, text_length: int) -> int:
        if self.layout is None or self.layout.more_text is None:  # nothing asks for it while the model is followed
            return 0
        return text_length + self.layout.more_text

    def is_lora_target(self, name: str, targets: LoraTargets) -> bool:
        layout, layer = self._layer(name)
        return layer not in layout.unused and is_of_kind(layer, targets)

    def is_text_output(self, name: str) -> bool:
        layout, layer = self._layer(name)
        return layer in layout.text_outputs

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        """See :class:`~.capabilities.MasksText`.

        Raises:
            UnsupportedModelError: If the attention of its blocks was not seen.
        """
        found = self.found
        if any(not found.text_keys.get(name) for name in found.lists):
            raise UnsupportedModelError(
                f"The blocks of {self.title} models do not use ComfyUI's attention in a way that can be followed, so the text "
                "cannot be hidden from them. Choose method preset or manual."
            )
        names = [self.blocks()[index].name for index in blocks]
        hidden = {name: found.text_keys[name.rpartition(".")[0]] for name in names}
        return hide_text(self._model, hidden, self._image_and_references)

    def _image_and_references(self, latent: Tensor, references: Sequence[Tensor]) -> int:
        """Return the number of tokens of the latents of a call, (B, C, H, W) or (B, C, frames, H, W), and references."""
        return self.reference_tokens([latent, *references])

    def _layer(self, name: str) -> tuple[ListLayout, str]:
        """Return the layout of a layer's list, and the layer's path within its block."""
        path = next(path for path in self.found.lists if name.startswith(f"{path}."))
        return self.found.lists[path], name.removeprefix(f"{path}.").partition(".")[2]


class _LaterBlockIO:
    """The IO of a list's blocks, which is known once the model has been followed."""

    def __init__(self, adapter: FollowedAdapter, name: str) -> None:
        self._adapter, self._name = adapter, name

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._adapter.block_io(self._name).entering(args, kwargs)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._adapter.block_io(self._name).leaving(result, args, kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return self._adapter.block_io(self._name).result(streams, args, kwargs)

    def copied(self, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall | None:
        return self._adapter.block_io(self._name).copied(args, kwargs)

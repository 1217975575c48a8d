"""A plain torch diffusion transformer as a :class:`~.model.SkippableDit`, without a host."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.lora import plain_weight
from .blocks.weight_sharing import move_weights
from .model import BlockInfo, BlockIO, Denoiser, WeightPlacement

# (the model, noisy (B, C, H, W), sigmas (B,), captions joined along the batch axis) -> clean estimate (B, C, H, W)
Denoise = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class TorchDit:
    """Your own module, with what the method needs to know about it.

    Each run replaces modules of the model by stand-ins and puts them back afterwards. The model's weights are not
    moved; those that a run needs are copied to ``device``. So a model may stay in host memory while the device holds
    only the trained part; anything outside the blocks, stem and head must already be on the device.

    Args:
        model: The module; its weights are never changed.
        blocks: Name of a list of blocks (an ``nn.ModuleList`` of the model) -> how they take and return their tokens;
            in execution order.
        stem: Paths of the modules before the first block.
        head: Paths of the modules after the last block.
        width: Width of a token, D.
        denoise: Calls the model; see :data:`Denoise`.
        captions: Embedded texts, each (1, L, any width).
        patch: Side of an image token in latent cells.
        text_in_stream: Whether text tokens pass through the blocks, rather than being read by cross attention.
        family: A name for the kind of model, stored in selections.
        device: The device to run on; by default that of the weights.
    """

    known_error = 0.0

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Mapping[str, BlockIO],
        stem: Sequence[str],
        head: Sequence[str],
        width: int,
        denoise: Denoise,
        captions: Sequence[Tensor],
        patch: int = 1,
        text_in_stream: bool = True,
        family: str = "torch",
        device: torch.device | None = None,
    ) -> None:
        self.model, self.captions = model, captions
        self.family, self.width, self.frozen_stem, self.trainable_head = family, width, stem, head
        self.blocks = [_info(f"{name}.{path}", block, io) for name, io in blocks.items()
                       for path, block in model.get_submodule(name).named_children()]  # fmt: skip
        self._call, self._patch, self._text_in_stream = denoise, patch, text_in_stream
        self._device = device

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return self._device or next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""
        return next(self.model.parameters()).dtype

    @property
    def room_for_blocks(self) -> int:
        """0, so that residuals are computed one block at a time, which takes the least memory."""
        return 0

    def module(self, name: str) -> nn.Module:
        """Return the model's own module at a path; it must never be changed."""
        return self.model.get_submodule(name)

    @contextmanager
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> Iterator[Denoiser]:
        """Put stand-ins in place for the duration of the context.

        Args:
            replacements: Path -> stand-in. Their weights are moved to the device.
            activation_bytes, weights: Ignored, because nothing is moved while the model runs.
        """
        originals = {name: self.module(name) for name in replacements}
        try:
            for name, module in replacements.items():
                move_weights(module, self.device)
                self._put(name, module)
            yield self.denoise
        finally:
            for name, module in originals.items():
                self._put(name, module)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        self.model.get_submodule(parent)._modules[leaf] = module

    def denoise(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the model's clean estimate; a :data:`~.model.Denoiser`."""
        texts = torch.cat([self.captions[caption] for caption in captions]).to(noisy.device)
        return self._call(self.model, noisy, sigmas, texts)

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens of a caption."""
        return self.captions[caption].shape[1]

    def batch_key(self, caption: int) -> Hashable:
        """Return the number of text tokens, which rows of a batch share."""
        return self.text_length(caption)

    def text_tokens(self, caption: int) -> int:
        """Return the number of text tokens between the blocks."""
        return self.text_length(caption) if self._text_in_stream else 0

    def image_tokens(self, rows: int, columns: int, channels: int | None = None) -> int:
        """Return the number of image tokens of a latent; it has one frame."""
        return math.ceil(rows / self._patch) * math.ceil(columns / self._patch)

    def weight_for_backward(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        """Provide a linear layer's weight."""
        return plain_weight(module, like)


def _info(name: str, block: nn.Module, io: BlockIO) -> BlockInfo:
    weights = list(block.parameters())
    return BlockInfo(name, io, sum(x.numel() for x in weights), sum(x.nbytes for x in weights))

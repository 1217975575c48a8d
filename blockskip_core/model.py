"""The residual stream of a diffusion transformer, and the interface through which this package sees every family.

A block takes image and text tokens (separately, or joined into one sequence) and returns them. A family's adapter says
how, in a :class:`BlockIO`; everything else works on :class:`TokenStreams` and knows nothing about the family.

Axis legend: ``B`` batch, ``N`` image tokens, ``L`` text tokens (with those of reference pictures), ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from .selection.selection import BlockSelection


@dataclass(frozen=True)
class TokenStreams:
    """Tokens between two blocks.

    Attributes:
        img: Image tokens, shape (B, N, D): those of the picture that is denoised.
        txt: Text tokens, shape (B, L, D), or None for families whose text is not part of the stream. Tokens of
            reference pictures count as text: like text they are read by the picture's tokens, and no head reads them.
    """

    img: Tensor
    txt: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStreams:
        """Return the streams with ``function`` applied to each tensor."""
        return TokenStreams(function(self.img), None if self.txt is None else function(self.txt))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        return {"img": self.img} if self.txt is None else {"img": self.img, "txt": self.txt}

    def minus(self, other: TokenStreams) -> TokenStreams:
        """Return the difference of the tokens that both have."""
        txt = None if self.txt is None or other.txt is None else self.txt - other.txt
        return TokenStreams(self.img - other.img, txt)

    def plus(self, other: TokenStreams) -> TokenStreams:
        """Return the sum of the tokens that both have."""
        txt = None if self.txt is None or other.txt is None else self.txt + other.txt
        return TokenStreams(self.img + other.img, txt)

    def without_text(self) -> TokenStreams:
        """Return the image tokens alone."""
        return TokenStreams(self.img)

    def rows(self) -> list[TokenStreams]:
        """Return one stream per row of the batch, on the CPU, each with its own memory; the batch axis stays."""
        texts = [None] * len(self.img) if self.txt is None else self.txt.split(1)
        pairs = zip(self.img.split(1), texts, strict=True)
        return [TokenStreams(img, txt).map(plain_copy) for img, txt in pairs]

    @staticmethod
    def cat(streams: Sequence[TokenStreams]) -> TokenStreams:
        """Return the streams joined along the batch axis."""
        texts = [s.txt for s in streams if s.txt is not None]
        return TokenStreams(torch.cat([s.img for s in streams]), torch.cat(texts) if texts else None)


def plain_copy(tensor: Tensor) -> Tensor:
    """Return an ordinary copy on the CPU; with weights in another pack's class, tokens are of that class too."""
    return tensor.as_subclass(Tensor).to("cpu", copy=True)


class BlockIO(Protocol):
    """How one kind of block takes and returns its tokens."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        """Return the tokens that a call passes to the block."""
        ...

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        """Return the tokens in the block's result of that call."""
        ...

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Return ``streams`` in the form in which the block would return them."""
        ...


@dataclass(frozen=True)
class CopiedCall:
    """A call of a block whose tokens have memory of their own.

    Attributes:
        args, kwargs: The call's arguments, with copies in the places of the tokens.
        tokens: The copies.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    tokens: Sequence[Tensor]


@runtime_checkable
class OverwritingIO(Protocol):
    """A :class:`BlockIO` of blocks that may overwrite the tokens that they are given."""

    def copied(self, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall | None:
        """Return the call with its tokens copied; None if the block does not overwrite them."""
        ...


@dataclass(frozen=True)
class BlockInfo:
    """One block of a model.

    Attributes:
        name: Path of the module below the diffusion model, e.g. "double_blocks.3".
        io: How it takes and returns tokens.
        num_parameters: Number of weights.
        num_bytes: Bytes of the weights as loaded.
    """

    name: str
    io: BlockIO
    num_parameters: int
    num_bytes: int


# (noisy (B, C, H, W), sigma (B,), caption index of each row) -> clean estimate (B, C, H, W)
Denoiser = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


WeightPlacement = Literal["as fits", "resident", "streamed"]
"""Where a run's weights are kept: as many on the device as the host decides, all of them, or none, in which case each
layer's weights are copied over when it runs."""


class SkippableDit(Protocol):
    """A diffusion transformer whose blocks can be replaced for the duration of a run, with any host.

    Computing residuals, training and counting need nothing else of a model. :class:`WrappedDit` passes everything on to
    another model, for classes that change only a part.
    """

    @property
    def family(self) -> str:
        """Name of the family, e.g. "flux"."""
        ...

    @property
    def blocks(self) -> Sequence[BlockInfo]:
        """All blocks in execution order."""
        ...

    @property
    def frozen_stem(self) -> Sequence[str]:
        """Paths of the modules before the first block, which need no gradient."""
        ...

    @property
    def trainable_head(self) -> Sequence[str]:
        """Paths of the modules after the last block; gradients pass through them."""
        ...

    @property
    def width(self) -> int:
        """Width of a token, D."""
        ...

    @property
    def known_error(self) -> float:
        """Relative difference from the full model's output that these blocks may cause.

        It is 0 unless they are quantised for the run. The self-check allows for it.
        """
        ...

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""
        ...

    @property
    def room_for_blocks(self) -> int:
        """Bytes of blocks that may be loaded together while residuals are computed."""
        ...

    def module(self, name: str) -> nn.Module:
        """Return the model's own module at a path; it must never be changed."""
        ...

    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> AbstractContextManager[Denoiser]:
        """Run the model with some modules replaced; afterwards it is as before, however the run ends.

        Args:
            replacements: Path -> stand-in.
            activation_bytes: Memory that the host should keep free in addition to the weights.
            weights: Where the weights are kept.
        """
        ...

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens passed to the model."""
        ...

    def batch_key(self, caption: int) -> Hashable:
        """Return a key that is equal for captions whose rows can be joined to a batch: as many tokens of each kind."""
        ...

    def text_tokens(self, caption: int) -> int:
        """Return the number of text tokens between the blocks, with padding and tokens of reference pictures.

        It is 0 if text is not in the stream.
        """
        ...

    def image_tokens(self, rows: int, columns: int, channels: int | None = None) -> int:
        """Return the number of image tokens of a latent.

        Args:
            rows, columns: Its size.
            channels: Its number of channels, which tells how many frames a clip has; None for those of the longest.
        """
        ...

    def weight_for_backward(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        """Provide the weight of a linear layer, shape (out, in), in the dtype and on the device of ``like``."""
        ...


class WrappedDit:
    """A :class:`SkippableDit` that passes everything on to another model; subclasses override what differs.

    Args:
        dit: The other model.
    """

    def __init__(self, dit: SkippableDit) -> None:
        self._wrapped = dit

    @property
    def family(self) -> str:
        return self._wrapped.family

    @property
    def blocks(self) -> Sequence[BlockInfo]:
        return self._wrapped.blocks

    @property
    def frozen_stem(self) -> Sequence[str]:
        return self._wrapped.frozen_stem

    @property
    def trainable_head(self) -> Sequence[str]:
        return self._wrapped.trainable_head

    @property
    def width(self) -> int:
        return self._wrapped.width

    @property
    def known_error(self) -> float:
        return self._wrapped.known_error

    @property
    def device(self) -> torch.device:
        return self._wrapped.device

    @property
    def dtype(self) -> torch.dtype:
        return self._wrapped.dtype

    @property
    def room_for_blocks(self) -> int:
        return self._wrapped.room_for_blocks

    def module(self, name: str) -> nn.Module:
        return self._wrapped.module(name)

    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> AbstractContextManager[Denoiser]:
        return self._wrapped.running(replacements, activation_bytes=activation_bytes, weights=weights)

    def text_length(self, caption: int) -> int:
        return self._wrapped.text_length(caption)

    def batch_key(self, caption: int) -> Hashable:
        return self._wrapped.batch_key(caption)

    def text_tokens(self, caption: int) -> int:
        return self._wrapped.text_tokens(caption)

    def image_tokens(self, rows: int, columns: int, channels: int | None = None) -> int:
        return self._wrapped.image_tokens(rows, columns, channels)

    def weight_for_backward(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        return self._wrapped.weight_for_backward(module, like)


def linear_names(dit: SkippableDit, selection: BlockSelection, wanted: Callable[[str], bool]) -> dict[str, nn.Linear]:
    """Return the linear layers of the adapted blocks for which ``wanted(native name)`` holds."""
    found: dict[str, nn.Linear] = {}
    for index in selection.adapted:
        block = dit.blocks[index].name
        for path, module in dit.module(block).named_modules():
            name = f"{block}.{path}"
            if is_linear(module) and wanted(name):
                found[name] = module
    return found


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Recognise a linear layer by its attributes, because hosts have their own classes for quantised weights.

    For the type checker it is torch's class: all of them have its ``in_features``, ``out_features``, ``weight`` and
    ``bias``.
    """
    return hasattr(module, "in_features") and hasattr(module, "out_features")

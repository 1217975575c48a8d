"""A transformer of diffusers as a :class:`~...model.SkippableDit`.

The user's model is never changed, not even for the duration of a run: a run takes a copy of its module tree that shares the
weights, puts the stand-ins into the copy, and moves the copy to the device. So there is nothing to put back, however the
run ends, and the model may stay in host memory while the device holds only what a run needs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...adapters.layer_kinds import is_of_kind
from ...adapters.lora import LoraTargets, plain_weight
from ...blocks.token_places import PlacedBlockIO
from ...blocks.weight_sharing import move_weights, weight_sharing_copy
from ...errors import BlockSkipError, InvalidInputError
from ...model import BlockInfo, Denoiser, WeightPlacement, is_linear
from ...selection.selection import BlockSelection
from .families import family_of
from .family import Text, paths_of
from .plain_weights import require_plain
from .replay_check import require_replay

_CHECKED: WeakKeyDictionary[nn.Module, Mapping[str, int]] = WeakKeyDictionary()
"""Models that have been checked, and the widths of the text with which they were."""
_ROOM = 4  # of the free memory, a quarter may be filled with blocks while residuals are computed


class DiffusersDit:
    """A transformer of diffusers that can be run with blocks replaced.

    The first time that a model is given, it is run once whole and once block by block, which must agree.

    Args:
        transformer: The model, e.g. ``pipeline.transformer``; left unchanged. It may be on another device.
        captions: Encoded texts, each the transformer's arguments of that text by their names there, with batch axis 1: from
            ``encode_captions``, or your own tensors.
        device: The device to run on; by default that of the weights.

    Attributes:
        model: The transformer.
        captions: The encoded texts, on the CPU.
        layout: What is known about its family.

    Raises:
        UnsupportedModelError: If the class is not known, a layer's weight is not plain numbers, or the model with its blocks
            replayed is another one than the whole.
        InvalidInputError: If there is no caption, or the model cannot be run with one.
    """

    known_error = 0.0

    def __init__(self, transformer: Any, captions: Sequence[Text], *, device: torch.device | str | None = None) -> None:
        self.model = transformer
        self.layout = family_of(transformer)
        require_plain(transformer)
        self.captions = [_require_text(number, text, self.layout.text_key) for number, text in enumerate(captions, 1)]
        if not captions:
            raise InvalidInputError("No caption came in. Give at least one encoded text.")
        self._device = None if device is None else torch.empty(0, device=device).device  # with its index
        self._num_img = 0
        self._check()

    def _check(self) -> None:
        """Check once per model that its blocks exchange nothing but tokens, and of every caption that it is of that kind."""
        if self.model not in _CHECKED:
            self._check_model()
            _CHECKED[self.model] = _widths(self.captions[0])
        expected = _CHECKED[self.model]
        for number, text in enumerate(self.captions, 1):
            if _widths(text) != expected:
                raise InvalidInputError(
                    f"Caption {number} has the widths {_widths(text)}, {self.layout.title} was run with {expected}. Encode all "
                    "captions with the pipeline that the model belongs to."
                )

    def _check_model(self) -> None:
        shape = (self.layout.channels(self.model.config), 2 * self.layout.patch, 3 * self.layout.patch)
        try:
            require_replay(self, shape, self.layout.title)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as problem:
            if isinstance(problem, (BlockSkipError, torch.OutOfMemoryError)):
                raise
            raise InvalidInputError(
                f"{self.layout.title} could not be run with these captions ({type(problem).__name__}: {problem}). Encode them "
                "with the pipeline that the model belongs to."
            ) from problem

    @property
    def family(self) -> str:
        """Short name of the family."""
        return self.layout.name

    @cached_property
    def blocks(self) -> Sequence[BlockInfo]:
        """All blocks in execution order."""
        return [
            _info(f"{name}.{path}", block, PlacedBlockIO(places, lambda: self._num_img))
            for name, places in self.layout.lists.items()
            for path, block in self.model.get_submodule(name).named_children()
        ]

    @property
    def frozen_stem(self) -> Sequence[str]:
        """Paths of the modules before the first block."""
        return paths_of(self.model, self.layout.stem)

    @property
    def trainable_head(self) -> Sequence[str]:
        """Paths of the modules after the last block; gradients pass through them."""
        return paths_of(self.model, self.layout.head)

    @cached_property
    def width(self) -> int:
        """Width of a token, D: what the first linear layer of a block reads."""
        return self._first_linear().in_features

    def _first_linear(self) -> nn.Linear:
        layers = self.module(self.blocks[0].name).named_modules()
        return next(layer for name, layer in layers if is_linear(layer) and is_of_kind(name, "attention"))

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return self._device or next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""
        return self._first_linear().weight.dtype

    @property
    def room_for_blocks(self) -> int:
        """Bytes of blocks that may be loaded together: a quarter of a GPU's free memory, or all on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // _ROOM
        return sum(block.num_bytes for block in self.blocks) if self.device.type == "cpu" else 0

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
        """Run a copy of the model with stand-ins in place, on the device.

        Args:
            replacements: Path -> stand-in. Their weights are moved to the device.
            activation_bytes: Ignored, because only what is needed is on the device.
            weights: "resident" moves the blocks that are not replaced to the device as well. Otherwise, if the model is on
                another device, each of their weights is copied there while the block runs, which gradients do not pass.

        Raises:
            UnsupportedModelError: If a LoRA has been loaded or a hook been added since the model was given.
        """
        require_plain(self.model)
        twin: Any = weight_sharing_copy(self.model)
        twin.gradient_checkpointing = False  # the stand-ins do it, and know the calls of the blocks without it only
        for name in self.layout.tables:
            setattr(twin, name, copy.copy(getattr(twin, name)))
        for name in self.layout.borrowed:
            twin._modules[name] = _Borrowed(self.module(name))
        streamed = {} if weights == "resident" else self._streamed(replacements)
        for name, module in {**streamed, **replacements}.items():
            parent, _, leaf = name.rpartition(".")
            twin.get_submodule(parent)._modules[leaf] = module
        move_weights(twin, self.device)
        yield lambda noisy, sigmas, captions: self._denoise(twin, noisy, sigmas, captions)

    def _streamed(self, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        names = [block.name for block in self.blocks if block.name not in replacements]
        own = {name: self.module(name) for name in names}
        return {name: _Streamed(block, self.device) for name, block in own.items() if _is_elsewhere(block, self.device)}

    def _denoise(self, model: Any, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return a model's clean estimate, in the dtype of ``noisy``."""
        text = self._joined(captions)
        self._num_img = self.image_tokens(*noisy.shape[-2:])
        velocity = self.layout.velocity(model, noisy.to(self.dtype), sigmas, text)
        return noisy - sigmas.view(-1, 1, 1, 1) * velocity.to(noisy.dtype)

    def _joined(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """Return the arguments of a batch, on the device; numbers in the dtype of the model."""
        rows = [self.captions[caption] for caption in captions]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise InvalidInputError(
                "Two captions of one batch have different arguments. Encode all captions in the same way, or set batch_size "
                "to 1."
            )
        joined = {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in joined.items()}

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens passed to the model."""
        return self.captions[caption][self.layout.text_key].shape[1]

    def batch_key(self, caption: int) -> Hashable:
        """Return the number of text tokens, which rows of a batch share."""
        return self.text_length(caption)

    def text_tokens(self, caption: int) -> int:
        """Return the number of text tokens between the blocks, padding included; 0 if text is read by cross attention."""
        return 0 if self.layout.cross_attention else self.layout.padded(self.text_length(caption))

    def image_tokens(self, rows: int, columns: int, channels: int | None = None) -> int:
        """Return the number of image tokens of a latent of one frame, padding included."""
        patch = self.layout.patch
        return self.layout.padded(math.ceil(rows / patch) * math.ceil(columns / patch))

    def weight_for_backward(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        """Provide a linear layer's weight."""
        return plain_weight(module, like)

    def lora_layers(
        self, selection: BlockSelection, targets: LoraTargets = "attention and mlp"
    ) -> Callable[[str], bool]:
        """Return which layers get an adapter: a function of a layer's path, for ``blockskip_core.train(layers=...)``.

        Layers of the last kept block that change only text tokens are left out, because nothing after it reads those.
        """
        last = self.blocks[selection.kept[-1]].name

        def wanted(name: str) -> bool:
            block = next(info.name for info in self.blocks if name.startswith(f"{info.name}."))
            layer = name.removeprefix(f"{block}.")
            without_effect = block == last and layer in self.layout.layout_of(block).text_outputs
            return is_of_kind(layer, targets) and not without_effect

        return wanted


class _Streamed(nn.Module):
    """A block whose weights are on the device only while it runs."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not registered: its weights must not be moved with the others
        self._device = device

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a copy of the block."""
        twin = weight_sharing_copy(self.__dict__["block"])
        move_weights(twin, self._device)
        return twin(*args, **kwargs)


class _Borrowed(nn.Module):
    """The model's own module without weights, which returns tensors.

    They are copied, because diffusers may have cached them when the model ran in inference mode, and autograd saves none of
    those.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not registered: it is the model's

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Call it."""
        return tuple(tensor.clone() for tensor in self.__dict__["module"](*args, **kwargs))


def _is_elsewhere(block: nn.Module, device: torch.device) -> bool:
    return any(parameter.device != device for parameter in block.parameters())


def _info(name: str, block: nn.Module, io: PlacedBlockIO) -> BlockInfo:
    weights = list(block.parameters())
    return BlockInfo(name, io, sum(x.numel() for x in weights), sum(x.nbytes for x in weights))


def _widths(text: Text) -> dict[str, int]:
    """Return the widths of a text's tokens and vectors; its numbers, such as a guidance, and its masks have none."""
    return {name: value.shape[-1] for name, value in text.items() if value.ndim > 1 and value.is_floating_point()}


def _require_text(number: int, text: Text, key: str) -> Text:
    """Return a caption's tensors on the CPU, without graphs and outside inference mode.

    Raises:
        InvalidInputError: If they are not one text.
    """
    if key not in text or any(len(value) != 1 for value in text.values()):
        raise InvalidInputError(
            f"Caption {number} must have `{key}` and batch axis 1 everywhere, got "
            f"{ {name: tuple(value.shape) for name, value in text.items()} }."
        )
    if not all(torch.isfinite(value).all() for value in text.values()):
        raise InvalidInputError(f"Caption {number} contains NaN or Inf. Check the text encoder.")
    with torch.inference_mode(False):
        return {name: value.detach().to("cpu", copy=True) for name, value in text.items()}

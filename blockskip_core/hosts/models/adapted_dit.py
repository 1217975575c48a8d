"""What the family's adapter tells about a model of the host, with or without weights."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any

import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...adapters.lora import LoraTargets
from ...model import BlockInfo, Denoiser, WeightPlacement, linear_names
from ...selection.selection import BlockSelection
from ..families.base import REFERENCE_TOKENS, TEXT_TOKENS
from ..families.registry import adapter_for
from ..inputs.conditioning import join_arguments, on_tensors
from ..inputs.frames import frames_in, latent_frames, with_frames, without_frames


class AdaptedDit(ABC):
    """Base of the host's :class:`~...model.SkippableDit` classes: everything that follows from the family's adapter.

    Args:
        patcher: Any object with the host's model as ``model``.

    Attributes:
        adapter: The family's adapter.
        patcher: The MODEL, or an object with its model.
        frames: Number of latent frames of the longest training example; 1 for pictures.
        known_error: 0, because weights that are used unchanged do not change the output; more if patches may be rounded.

    Raises:
        UnsupportedModelError: If no adapter supports the model.
    """

    known_error: float = 0.0
    frames: int = 1

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.adapter = adapter_for(patcher)
        self.family: str = self.adapter.family

    @property
    def frozen_stem(self) -> Sequence[str]:
        """Paths of the modules before the first block, which need no gradient."""
        return self.adapter.frozen_stem

    @property
    def trainable_head(self) -> Sequence[str]:
        """Paths of the modules after the last block; gradients pass through them."""
        return self.adapter.trainable_head

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.adapter.width

    @cached_property
    def blocks(self) -> Sequence[BlockInfo]:
        """All blocks in execution order."""
        return self.adapter.blocks()

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Weight bytes of each block as loaded."""
        return tuple(block.num_bytes for block in self.blocks)

    @property
    @abstractmethod
    def arguments(self) -> Sequence[Mapping[str, Any]]:
        """The model's arguments besides latent and sigma, for each caption, batch axis 1."""

    def arguments_of(self, caption: int, shape: tuple[int, ...]) -> Mapping[str, Any]:
        """Return a caption's :attr:`arguments` for latents of a shape (C, H, W), on which some of them depend."""
        return self.arguments[caption]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the model runs on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""

    @property
    @abstractmethod
    def room_for_blocks(self) -> int:
        """Bytes of blocks that may be loaded together while residuals are computed."""

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """Return the model's own module at a path; it must never be changed."""

    @abstractmethod
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> AbstractContextManager[Denoiser]:
        """Run the model with some modules replaced; see the contract."""

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens passed to the model for a caption."""
        return self.arguments[caption]["c_crossattn"].shape[1]

    def text_tokens(self, caption: int) -> int:
        """Return the number of text tokens in the stream for a caption; those of references and of sound count as text.

        The sound is that of the longest training example.
        """
        others = self.adapter.reference_tokens(self._references_of(caption))
        return self.adapter.text_tokens(self.text_length(caption)) + others + self.adapter.sound_tokens(self.frames)

    def batch_key(self, caption: int) -> Hashable:
        """Return the length of a caption's text and the shapes of its reference latents."""
        return self.text_length(caption), *(tuple(latent.shape) for latent in self._references_of(caption))

    def _references_of(self, caption: int) -> Sequence[Tensor]:
        return self.adapter.references_among(self.arguments[caption])

    def image_tokens(self, rows: int, columns: int, channels: int | None = None) -> int:
        """Return the number of image tokens of a training example's latent, including the host's padding."""
        frames = self.frames if channels is None else frames_in(self._host_model, channels)
        return frames * self.adapter.image_tokens(rows, columns)

    @property
    @abstractmethod
    def _host_model(self) -> Any:
        """The host's model (a BaseModel)."""

    def lora_layers(self, selection: BlockSelection, targets: LoraTargets) -> dict[str, nn.Linear]:
        """Return the linear layers that get an adapter, by their native names.

        Layers of the last kept block that affect only text tokens are left out: nothing after that block reads those,
        so they would get no gradient.
        """
        last = self.blocks[selection.kept[-1]].name + "."

        def wanted(name: str) -> bool:
            without_effect = name.startswith(last) and self.adapter.is_text_output(name)
            return self.adapter.is_lora_target(name, targets) and not without_effect

        return linear_names(self, selection, wanted)

    @contextmanager
    def weight_for_backward(self, module: nn.Module, like: Tensor) -> Iterator[Tensor]:
        """Provide a linear layer's weight as the host does for its own forward, whatever the storage format."""
        layer: Any = module  # of the host's classes, or of another pack's
        if hasattr(layer, "cast_bias_weight"):  # other packs' packed layers (GGUF) have their own cast
            yield layer.cast_bias_weight(like)[0]
            return
        if not hasattr(layer, "weight_function"):
            yield _as_applied(layer, layer.weight.to(like))
            return
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
        try:
            yield _as_applied(layer, weight)
        finally:
            comfy.ops.uncast_bias_weight(layer, weight, bias, stream)

    def _denoiser(self, model: Any, options: Mapping[str, Any]) -> Denoiser:
        """Return the denoiser of a model that is ready to run.

        Args:
            model: The host's model (a BaseModel).
            options: ``transformer_options`` of every call.
        """

        def denoise(noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
            self.adapter.require_rows(len(captions))
            shape = tuple(noisy.shape[1:])
            joined = join_arguments([self.arguments_of(caption, shape) for caption in captions])
            joined = {name: _to(value, self.device) for name, value in joined.items()}
            call_options = {**options, **self.adapter.call_options, **_options_of_a_sampler(sigmas, captions)}
            frames = frames_in(model, noisy.shape[1])
            text = self.adapter.text_tokens(joined["c_crossattn"].shape[1])
            call_options[TEXT_TOKENS] = text + self.adapter.sound_tokens(frames)
            references = self.adapter.reference_tokens(self.adapter.references_among(joined))
            call_options |= {REFERENCE_TOKENS: references} if references else {}
            _, _, rows, columns = noisy.shape
            self.adapter.prepare_call(frames, rows, columns, references)
            latents = with_frames(model, noisy)
            call = partial(model.apply_model, transformer_options=call_options, **joined)
            sound = self.adapter.sound(frames, sigmas)
            denoised = call(latents, sigmas) if sound is None else _with_sound(call, latents, sound, sigmas)
            return without_frames(model, denoised)

        return denoise


def _with_sound(call: Callable[[Tensor, Tensor], Tensor], latents: Tensor, sound: Tensor, sigmas: Tensor) -> Tensor:
    """Return the clean estimate of a picture or clip from a model that denoises it together with a sound."""
    packed, shapes = comfy.utils.pack_latents([latents, sound.to(latents)])
    return comfy.utils.unpack_latents(call(packed, sigmas), shapes)[0]


def frames_of_clip(patcher: Any, pictures: int) -> int:
    """Return the number of latent frames of a clip of ``pictures`` pictures.

    Raises:
        InvalidInputError: If the model makes pictures, or its clips have other lengths.
        UnsupportedModelError: If no adapter supports the model.
    """
    return latent_frames(patcher.model, pictures, adapter_for(patcher).clip_lengths)


def _options_of_a_sampler(sigmas: Tensor, captions: Sequence[int]) -> dict[str, Any]:
    """Return the options that the host's samplers pass to a model: noise levels, and the conditionings of the call.

    Args:
        sigmas: Noise levels of the batch, shape (B,).
        captions: Index of each row's caption; rows with the same caption are a batch of one conditioning.
    """
    conditionings = captions if len(set(captions)) > 1 else captions[:1]
    return {
        "sigmas": sigmas,
        "sample_sigmas": sigmas,  # those of all steps; here every call is a run of one step
        "cond_or_uncond": [0] * len(conditionings),  # 0: the positive one
        "uuids": [uuid.UUID(int=caption) for caption in conditionings],
    }


def _to(value: Any, device: torch.device) -> Any:
    return on_tensors(value, lambda tensor: tensor.to(device))


def _as_applied(layer: Any, weight: Tensor) -> Tensor:
    """Return the plain matrix by which a layer multiplies its input.

    The host leaves a weight quantised if its nominal dtype already matches, and a product with a quantised weight would
    round the gradient as well. Smoothed formats scale the input channel by channel before applying the weight.
    """
    if is_traceable_wrapper_subclass(weight):
        weight = weight.dequantize()
    smoothing = getattr(layer, "pre_quant_scale", None)
    return weight if smoothing is None else weight * smoothing.to(weight)

"""A model without weights as a :class:`~...model.SkippableDit`, for counting a run before it starts.

The host's own classes run on the ``meta`` device. The host's loader is not used, because it would allocate the weights.
Instead a run creates ``meta`` tensors of the sizes that would be loaded, so that a counter sees them come and go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...accounting.fused_kernels import FusedAttention, has_fused_rms_norm, with_fused_kernels
from ...accounting.weightless import PACKED, replaced, weightless_copy
from ...model import Denoiser, WeightPlacement, is_linear
from ..families.followed import FollowedAdapter
from ..families.published_sizes import published_model
from ..families.registry import adapter_for
from ..inputs.conditioning import model_arguments, on_tensors
from ..inputs.frames import frames_in, with_frames
from .adapted_dit import AdaptedDit
from .hosted_dit import HostedDit

# Attributes set by the host's memory management and by patches on single layers; with them a layer would look for its
# weights.
_MARKS: dict[str, Any] = {"_v": None, "_prefetch": None, "weight_function": [], "bias_function": []}


_META = torch.device("meta")


class WeightlessDit(AdaptedDit):
    """A model whose tensors have shapes but no data.

    Args:
        model: The host's model (a BaseModel) with all weights on ``meta``.
        arguments: The model's arguments besides latent and sigma, for each caption, batch axis 1; any device.
        runs_on: The device whose kernels are counted.
    """

    def __init__(self, model: Any, arguments: Sequence[Mapping[str, Any]], runs_on: torch.device) -> None:
        self.model = model
        super().__init__(comfy.model_patcher.ModelPatcher(model, load_device=_META, offload_device=_META))
        self._arguments = [{name: _shape_of(value) for name, value in row.items()} for row in arguments]
        if self.adapter.reads_noise_levels:  # the model is ours, so the hook is nobody else's
            model.diffusion_model.register_forward_pre_hook(_with_some_noise_level, with_kwargs=True)
        for block in self.blocks:
            with_fused_kernels(self.module(block.name), has_fused_rms_norm(runs_on))

    @classmethod
    def of(cls, dit: HostedDit) -> WeightlessDit:
        """Return the weightless twin of a loaded MODEL, with the same captions."""
        twin = cls(weightless_model(dit.patcher), dit.arguments, dit.patcher.load_device)
        twin.frames = dit.frames
        if isinstance(twin.adapter, FollowedAdapter) and isinstance(dit.adapter, FollowedAdapter):
            twin.adapter.layout = dit.adapter.layout
        return twin

    @classmethod
    def published(
        cls, name: str, caption: list, latent_shape: Sequence[int], dtype: torch.dtype = torch.bfloat16
    ) -> WeightlessDit:
        """Return a published model at its full size, to be counted as on an NVIDIA or AMD card.

        Args:
            name: A key of ``published_sizes.PUBLISHED_SIZES``.
            caption: A conditioning, ``[[tensor, settings]]``.
            latent_shape: (C, H, W).
            dtype: Dtype of the weights. If the host cannot compute in it, it casts to bfloat16 for every use.
        """
        cast_to = torch.bfloat16 if dtype.itemsize < 2 else None
        model = published_model(name, dtype, cast_to)
        with torch.inference_mode(False), torch.no_grad():
            latent = with_frames(model, torch.zeros(1, *latent_shape))
            frames = frames_in(model, latent_shape[0])
            sound = adapter_for(SimpleNamespace(model=model)).sound(frames, torch.ones(1))
            arguments = model_arguments(model, caption, latent, torch.device("cpu"), sound)
            dit = cls(model, [arguments], torch.device("cuda"))
        dit.frames = frames
        return dit

    @property
    def arguments(self) -> Sequence[Mapping[str, Any]]:
        """The model's arguments besides latent and sigma, for each caption; shapes only."""
        return self._arguments

    def arguments_of(self, caption: int, shape: tuple[int, ...]) -> Mapping[str, Any]:
        """Return a caption's :attr:`arguments`; a picture beside the latent has the latent's shape."""
        row = self.arguments[caption]
        if "c_concat" not in row:
            return row
        _, channels, *frames, _, _ = row["c_concat"].shape
        frames = [frames_in(self.model, shape[0])] * len(frames)
        return {**row, "c_concat": row["c_concat"].new_empty(1, channels, *frames, *shape[1:])}

    @property
    def _host_model(self) -> Any:
        return self.model

    @property
    def room_for_blocks(self) -> int:
        """0, so that one block at a time is loaded: the least that precomputing can take."""
        return 0

    @property
    def device(self) -> torch.device:
        """``meta``."""
        return _META

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the token streams."""
        return self.model.get_dtype_inference()

    def module(self, name: str) -> nn.Module:
        """Return the module at a path; it must never be changed."""
        return self.model.diffusion_model.get_submodule(name)

    @contextmanager
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> Iterator[Denoiser]:
        """Run a shallow copy of the model with ``replacements`` in place.

        Args:
            replacements: Path below the diffusion model -> stand-in.
            activation_bytes, weights: Ignored; everything counts as loaded.

        Yields:
            The denoiser, bound to the captions.
        """
        model: Any = replaced(self.model, {f"diffusion_model.{name}": module for name, module in replacements.items()})
        was_training = comfy.model_management.in_training
        loaded = [torch.empty_like(tensor) for tensor in _weights(model.diffusion_model)]
        self.patcher.model = model  # as in a run of a loaded MODEL, where hooks go onto the stand-ins
        try:
            comfy.model_management.in_training = True  # the kernels that a training run uses
            yield self._denoiser(model, {"optimized_attention_override": torch_attention})
        finally:
            self.patcher.model = self.model
            comfy.model_management.in_training = was_training
            loaded.clear()


def weightless_model(patcher: Any) -> Any:
    """Return the weightless twin of a MODEL's model; it computes in the same dtype."""
    model = weightless_module(patcher.model)
    _compute_as(model, patcher)
    model.current_patcher = None
    return model


def weightless_module(module: nn.Module) -> Any:
    """Return the weightless twin of one of the host's modules, with every layer of the host's own classes."""
    twin = weightless_copy(module, without=_MARKS)
    _replace_packed_layers(twin)
    return twin


def torch_attention(attention: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Use torch's fused attention kernel, the host's default on a GPU."""
    with FusedAttention():
        return attention_pytorch(*args, **kwargs)


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the tensors that are loaded: parameters and buffers, each once, without trainable ones."""
    tensors = (*module.parameters(), *module.buffers())
    return list({id(tensor): tensor for tensor in tensors if not tensor.requires_grad}.values())


def _with_some_noise_level(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook for a pass without values: a noise level that the model can read as a number."""
    latent, timesteps, *others = args
    return (latent, torch.full(timesteps.shape, 500.0), *others), kwargs


def _shape_of(value: Any) -> Any:
    return on_tensors(value, lambda tensor: torch.empty_like(tensor, device="meta"))


def _compute_as(model: Any, patcher: Any) -> None:
    """Give a copy the compute dtype that another node has set on the MODEL; the host casts every weight to it."""
    model.manual_cast_dtype = patcher.get_model_object("manual_cast_dtype")
    if patcher.force_cast_weights:
        for layer in model.diffusion_model.modules():
            if hasattr(layer, "comfy_cast_weights"):
                layer.comfy_cast_weights = True


def _replace_packed_layers(module: nn.Module) -> None:
    """Replace other packs' packed layers, which cannot unpack a shape, by the host's own layers.

    Like those, they create a weight in the computation's dtype whenever they run.
    """
    for name, child in module._modules.items():
        if child is None:
            continue
        if is_linear(child) and hasattr(child, "cast_bias_weight"):
            module._modules[name] = comfy.ops.manual_cast.Linear(
                child.in_features, child.out_features, bias=child.bias is not None, device="meta", dtype=PACKED
            )
        else:
            _replace_packed_layers(child)

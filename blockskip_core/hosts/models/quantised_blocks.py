"""Kept blocks quantised for the duration of a run, in the host's own formats: more model in the same GPU memory.

LoRA on a quantised base is the idea of QLoRA (arXiv 2305.14314). Here only the linear weights of the kept blocks are
quantised, one layer at a time, when a run begins:

    original weight (not moved) --[+ the user's patches]--> float32, one layer --> quantised copy in host RAM

The host loads the quantised copy, so no more than one layer is ever unpacked: in a forward or backward pass a layer's
weight is dequantised, used and dropped. Inputs are not quantised, so gradients are those of the quantised weights.
Patches (a LoRA applied earlier) are quantised with the weight and are not applied again.

The residuals are those of the model as loaded, because skipped blocks are not quantised. So before the first step the
trained model differs from the full model by the quantisation error, and the self-check has to allow for that:
:attr:`QuantisedDit.known_error`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, get_args

import comfy.ops
import comfy.quant_ops
import comfyui_version
import torch
from torch import Tensor, nn

from ...accounting.weight_formats import (
    WEIGHT_FORMATS,
    QuantizeKept,
    is_host_quantised,
    is_shrunk,
    predicted_bytes,
    stored_bytes,
)
from ...adapters.lora import LoraTargets
from ...blocks.weight_sharing import copy_hooks, weight_sharing_copy
from ...errors import InvalidInputError
from ...model import BlockInfo, Denoiser, WeightPlacement, WrappedDit
from ...selection.selection import BlockSelection
from .hosted_dit import ERROR_ALLOWANCE, HostedDit

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (done, total) layers; may raise to interrupt

_SMALLEST_STREAMED = 16 * 1024  # bytes; the host keeps smaller layers resident, without a place in virtual memory


def available_formats() -> list[str]:
    """Return the choices of ``quantize_kept`` on this host, "off" first."""
    names = get_args(QuantizeKept)
    if not issubclass(comfy.quant_ops.QuantizedTensor, Tensor):  # comfy_kitchen is not installed
        return list(names[:1])
    return [name for name in names if name == "off" or WEIGHT_FORMATS[name].algorithm in comfy.quant_ops.QUANT_ALGOS]


def default_for_frozen_blocks() -> str:
    """Return the default format of blocks without adapters: eight bits, or "off" if the host has none.

    Eight bits lose nothing in the quality benchmark; four bits lose likeness there, so they are for small cards.
    """
    return "int8" if "int8" in available_formats() else "off"


def formats_on(device: torch.device) -> list[str]:
    """Return the choices of ``quantize_kept`` on a device, "off" first: not every device supports 8-bit numbers."""
    return [name for name in available_formats() if name == "off" or _works_on(name, str(device))]


@cache
def _works_on(weight_format: str, device: str) -> bool:
    """Try a format on a device: quantise a small matrix there and unpack it again."""
    weight = torch.linspace(-1.0, 1.0, 64 * 64).view(64, 64)
    try:
        packed = _packed(weight.to(device), weight_format)
        error = (packed.dequantize().float().cpu() - weight).norm() / weight.norm()
    except (RuntimeError, TypeError, NotImplementedError) as problem:  # each device fails in its own way
        logger.info("BlockSkip: no weights in %s on %s: %s", weight_format, device, problem)
        return False
    return error.item() < 0.2


def require_known(weight_format: str, setting: str = "quantize_kept") -> None:
    """Raise InvalidInputError if the host has no weights in the format of a setting."""
    if weight_format not in available_formats():
        raise InvalidInputError(
            f"{setting} {weight_format!r} is not a format of this ComfyUI ({comfyui_version.__version__}), which "
            f"has {', '.join(available_formats())}. Choose one of these, or update ComfyUI."
        )


def require_available(weight_format: str, device: torch.device, setting: str = "quantize_kept") -> None:
    """Raise InvalidInputError if the host, or the device, cannot keep weights in the format of a setting."""
    require_known(weight_format, setting)
    if weight_format not in formats_on(device):
        raise InvalidInputError(
            f"{setting} {weight_format!r} does not work on this device ({device}). "
            f"Choose one of {', '.join(formats_on(device))}."
        )


class QuantisedDit(WrappedDit):
    """A :class:`HostedDit` with the named blocks quantised.

    Args:
        dit: The model. It is not changed, and can still be used unquantised.
        formats: Path of a block -> a key of ``WEIGHT_FORMATS``.

    Attributes:
        layer_errors: Layer -> relative error of its quantised weight (Frobenius norm); filled by :meth:`quantise`.

    Raises:
        InvalidInputError: If the host does not have the format.
    """

    def __init__(self, dit: HostedDit, formats: Mapping[str, str]) -> None:
        for weight_format in sorted(set(formats.values())):
            require_available(weight_format, dit.device)
        super().__init__(dit)
        self.layer_errors: dict[str, float] = {}
        self._dit, self._formats = dit, dict(formats)
        self._blocks: dict[str, nn.Module] = {}
        self._baked: set[str] = set()

    @cached_property
    def blocks(self) -> Sequence[BlockInfo]:
        """All blocks, with the bytes that they take in this run."""
        return [
            dataclasses.replace(
                block, num_bytes=predicted_bytes(self._dit.module(block.name), self._formats[block.name])
            )
            if block.name in self._formats
            else block
            for block in self._dit.blocks
        ]

    @property
    def known_error(self) -> float:
        """Relative difference from the full model that quantisation may cause, for the self-check.

        :data:`ERROR_ALLOWANCE` times the worst layer's error, as measured on this model's own weights.
        """
        return max(self._dit.known_error, ERROR_ALLOWANCE * max(self.layer_errors.values(), default=0.0))

    def packs_into(self, weight_format: str) -> bool:
        """Return whether any layer is packed into a format: those that are as small already stay as they are."""
        tree = self._dit.patcher.model.diffusion_model  # shapes are read only, so nothing has to be unloaded
        named = (name for name, own in self._formats.items() if own == weight_format)
        return any(self._shrunk(name, tree.get_submodule(name)) for name in named)

    def module(self, name: str) -> nn.Module:
        """Return the quantised block, or the model's own module if that block is not quantised."""
        if name not in self._formats:
            return self._dit.module(name)
        self.quantise()
        return self._blocks[name]

    @contextmanager
    def running(
        self,
        replacements: Mapping[str, nn.Module],
        *,
        activation_bytes: int = 0,
        weights: WeightPlacement = "as fits",
    ) -> Iterator[Denoiser]:
        """Run like the HostedDit, with room for one dequantised layer, and without the patches already merged."""
        room = bytes_to_unpack(self._largest_layer, self._dit.dtype)
        with self._dit.running(
            replacements, activation_bytes=activation_bytes + room, weights=weights, baked=frozenset(self._baked)
        ) as denoise:
            yield denoise

    def lora_layers(self, selection: BlockSelection, targets: LoraTargets) -> dict[str, nn.Linear]:
        """Return the linear layers that get an adapter; quantisation changes neither which ones nor their names."""
        return self._dit.lora_layers(selection, targets)

    @cached_property
    def _largest_layer(self) -> int:
        layers = (layer for name in self._formats for _, layer in self._shrunk(name, self._dit.module(name)))
        return max((math.prod(layer.weight.shape) for layer in layers), default=0)

    def _shrunk(self, name: str, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        return [(path, layer) for path, layer in block.named_modules() if is_shrunk(layer, self._formats[name])]

    def quantise(self, progress: Progress | None = None) -> None:
        """Quantise the blocks, once; if not called, this happens when the first of them is requested.

        Args:
            progress: Called after every layer.
        """
        if self._blocks:
            return
        blocks = {name: weight_sharing_copy(self._dit.module(name)) for name in self._formats}
        found = [(name, path, layer) for name, block in blocks.items() for path, layer in self._shrunk(name, block)]
        linear_class = _weight_only_linear(self._dit.dtype)
        with torch.inference_mode(False), torch.no_grad():
            for done, (name, path, layer) in enumerate(found, 1):
                parent, _, leaf = path.rpartition(".")
                quantised = self._quantised(f"{name}.{path}", layer, self._formats[name], linear_class)
                blocks[name].get_submodule(parent)._modules[leaf] = quantised
                if progress:
                    progress(done, len(found))
        self._blocks = blocks

    def _quantised(self, name: str, layer: nn.Linear, weight_format: str, linear_class: Any) -> nn.Module:
        weight = self._with_patches(name, layer)
        packed = _packed(weight, weight_format)
        error = (packed.dequantize() - weight).norm() / weight.norm().clamp_min(1e-30)
        self.layer_errors[name] = error.item()
        linear = linear_class(layer.in_features, layer.out_features, bias=False)
        linear.quant_format, linear.layout_type = WEIGHT_FORMATS[weight_format].algorithm, _layout(weight_format)
        kept = packed.to(device=self._dit.patcher.offload_device, dtype=self._dit.dtype)
        linear.weight = nn.Parameter(kept, requires_grad=False)
        linear._parameters["bias"] = layer.bias
        copy_hooks(layer, linear)
        _share_place(layer, linear)
        return linear

    def _with_patches(self, name: str, layer: nn.Linear) -> Tensor:
        """Return a layer's weight as the host would load it, in float32 on the device."""
        patcher, key = self._dit.patcher, f"diffusion_model.{name}.weight"
        weight: Tensor = layer.weight
        if key in patcher.patches:
            weight = patcher.patch_weight_to_device(key, device_to=self._dit.device, return_weight=True)
            self._baked.add(key)
        weight = weight.detach().to(device=self._dit.device)
        return (weight.dequantize() if is_host_quantised(weight) else weight).to(torch.float32)


def bytes_to_unpack(numbers: int, dtype: torch.dtype) -> int:
    """Return the bytes that a layer takes while it is unpacked: in the computation's dtype, and in float32 before.

    The host's kernels for NVIDIA's cards write that dtype directly; everywhere else float32 is an intermediate step.

    Args:
        numbers: Number of elements of the layer's weight.
        dtype: Dtype of the computation.
    """
    return numbers * (dtype.itemsize + torch.float32.itemsize)


def _packed(weight: Tensor, weight_format: str) -> Tensor:
    """Quantise a matrix in one of the host's own formats."""
    options = WEIGHT_FORMATS[weight_format].options
    return comfy.quant_ops.QuantizedTensor.from_float(weight, _layout(weight_format), **options)


def _layout(weight_format: str) -> str:
    return comfy.quant_ops.QUANT_ALGOS[WEIGHT_FORMATS[weight_format].algorithm]["comfy_tensor_layout"]


def _weight_only_linear(dtype: torch.dtype) -> Any:
    """Return a version of the host's class for quantised layers that never quantises inputs."""
    host_class = comfy.ops.mixed_precision_ops({}, dtype, full_precision_mm=True).Linear

    class WeightOnlyLinear(host_class):  # type: ignore[misc, valid-type]  # the class is made by a call
        def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # The host passes the weight quantised if its nominal dtype matches, and some formats then quantise x.
            if isinstance(weight, comfy.quant_ops.QuantizedTensor):
                weight = weight.dequantize()
            return nn.functional.linear(x, weight, bias)

    return WeightOnlyLinear


def _share_place(layer: Any, quantised: Any) -> None:
    """Give a layer's place in the host's virtual memory to its quantised form, because places are never released.

    Only one of the two is ever loaded, and the host forgets a place's content when the patches id changes.
    """
    size = stored_bytes(quantised.weight)
    if hasattr(layer, "_v") and _SMALLEST_STREAMED < size <= layer.weight.nbytes:
        quantised._v = layer._v

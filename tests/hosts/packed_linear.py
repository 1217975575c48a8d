"""A stand-in for another pack's packed layers, with only those features of GGUF layers that our pack relies on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_GROUP = 32


class PackedTensor(Tensor):
    """Bytes that present themselves as a matrix."""

    logical: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(getattr(self, "logical", self.size()))

    def to(self, *args: Any, **kwargs: Any) -> PackedTensor:
        moved = super().to(*args, **kwargs)
        moved.logical = tuple(self.shape)
        return moved

    def detach(self) -> PackedTensor:
        return self

    @classmethod
    def dress(cls, parameter: Tensor) -> PackedTensor:
        """The same numbers in this class without packing, as files store small tensors."""
        dressed = parameter.as_subclass(cls)
        dressed.logical = tuple(parameter.shape)
        return nn.Parameter(dressed, requires_grad=False)

    @classmethod
    def pack(cls, weight: Tensor) -> PackedTensor:
        """Eight bits per number and a float16 scale per 32 numbers, one row of bytes per group."""
        groups = weight.float().reshape(-1, _GROUP)
        scales = (groups.abs().amax(1, keepdim=True) / 127).half()
        numbers = (groups / scales.float()).round().to(torch.int8)
        packed = torch.cat((scales.view(torch.uint8), numbers.view(torch.uint8)), 1).as_subclass(cls)
        packed.logical = tuple(weight.shape)
        return packed

    def unpack(self, dtype: torch.dtype) -> Tensor:
        raw = self.as_subclass(Tensor)
        scales, numbers = raw[:, :2].contiguous().view(torch.float16), raw[:, 2:].contiguous().view(torch.int8)
        return (numbers.to(dtype) * scales.to(dtype)).reshape(self.logical)


def pack_blocks(diffusion_model: nn.Module) -> None:
    """Replace the blocks' linear layers by packed ones, and wrap all other weights in the file's class."""
    for block in (*diffusion_model.double_blocks, *diffusion_model.single_blocks):
        for name, layer in list(block.named_modules()):
            if hasattr(layer, "in_features"):
                parent, _, leaf = name.rpartition(".")
                block.get_submodule(parent)._modules[leaf] = _packed(layer)
    for module in diffusion_model.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter:
                module._parameters[name] = PackedTensor.dress(parameter)


def _packed(layer: nn.Module) -> nn.Module:
    import comfy.ops

    class PackedLinear(comfy.ops.manual_cast.Linear):
        """Casts its weight itself, and exposes only its size in a state dict."""

        def cast_bias_weight(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.weight.unpack(like.dtype), None if self.bias is None else self.bias.to(like)

        def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, *self.cast_bias_weight(x))

        def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
            for name, tensor in self._parameters.items():
                if tensor is not None:
                    destination[prefix + name] = torch.empty(tuple(tensor.size()), dtype=tensor.dtype, device="meta")

    packed = PackedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    packed._parameters["weight"] = PackedTensor.pack(layer.weight)
    packed._parameters["bias"] = layer.bias
    return packed

"""How many bytes weights take: as stored now, and after quantisation, from shapes alone.

The formats are the host's (ComfyUI can keep whole models in them); nothing is quantised here. Bytes by format for a
weight of shape (out, in), including what each format stores besides the numbers:

    fp8      1 byte per number, one float32 scale
    int8     1 byte per number, a float32 scale per row
    4-bit    NVFP4: half a byte per number, an 8-bit scale for every 16 numbers of a row, one float32 scale. Rows and
             columns are padded to multiples of 16, and the scales to tiles of 128 rows by 4 scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..model import is_linear

QuantizeKept = Literal["off", "fp8", "int8", "4-bit"]


@dataclass(frozen=True)
class WeightFormat:
    """A format for the weights of linear layers.

    Attributes:
        algorithm: The host's name for the format.
        num_bytes: (out, in) -> bytes.
        options: Arguments for the host's quantiser.
    """

    algorithm: str
    num_bytes: Callable[[int, int], int]
    options: Mapping[str, Any] = field(default_factory=dict)


def _up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _nvfp4_bytes(rows: int, columns: int) -> int:
    rows, columns = _up_to(rows, 16), _up_to(columns, 16)
    return rows * columns // 2 + _up_to(rows, 128) * _up_to(columns // 16, 4) + 4


SMALLER = 0.9
"""A weight is rounded once more only to become smaller than this share of itself."""
WEIGHT_FORMATS: dict[str, WeightFormat] = {
    "fp8": WeightFormat("float8_e4m3fn", lambda rows, columns: rows * columns + 4, {"scale": "recalculate"}),
    "int8": WeightFormat("int8_tensorwise", lambda rows, columns: rows * columns + 4 * rows, {"per_channel": True}),
    "4-bit": WeightFormat("nvfp4", _nvfp4_bytes, {"scale": "recalculate"}),
}


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in memory, including the scales of a quantised one."""
    if is_traceable_wrapper_subclass(tensor):
        parts: Any = tensor
        return sum(stored_bytes(getattr(parts, name)) for name in parts.__tensor_flatten__()[0])
    return tensor.nbytes


def is_quantizable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is a linear one whose weight is a matrix of at least a byte per number that can be read.

    That is a plain matrix, or one of the host's quantised ones. Layers whose inputs are scaled too are not, nor those that
    are packed by other packs.
    """
    if not is_linear(layer):
        return False
    weight: Any = getattr(layer, "weight", None)  # packed layers of other packs may have none
    if type(weight) in (Tensor, nn.Parameter):
        is_readable = weight.is_floating_point()
    else:
        is_readable = is_host_quantised(weight) and getattr(layer, "pre_quant_scale", None) is None
    return is_readable and weight.dim() == 2 and stored_bytes(weight) >= weight.numel()


def is_host_quantised(weight: Any) -> bool:
    """Return whether a weight is one of the host's quantised tensors, which ``dequantize`` gives in 16 or 32 bits."""
    return isinstance(weight, Tensor) and is_traceable_wrapper_subclass(weight) and hasattr(weight, "dequantize")


def is_shrunk(layer: nn.Module, weight_format: str) -> TypeGuard[nn.Linear]:
    """Return whether a layer would take fewer bytes in a format; other layers are left unchanged.

    A model in eight bits is not changed by a format of eight bits, only by one of four.
    """
    if not is_quantizable(layer):
        return False
    rows, columns = layer.weight.shape
    return WEIGHT_FORMATS[weight_format].num_bytes(rows, columns) < SMALLER * stored_bytes(layer.weight)


def predicted_bytes(block: nn.Module, weight_format: str) -> int:
    """Return the bytes that a block's weights would take with its linear layers quantised.

    Only shapes and dtypes are read, so the block may be on the meta device. Biases, norms, and layers that would hardly
    become smaller stay unchanged.

    Args:
        block: The block as loaded.
        weight_format: A key of ``WEIGHT_FORMATS``, or "off".
    """
    total = sum(stored_bytes(parameter) for parameter in block.parameters())
    if weight_format == "off":
        return total
    weights = [layer.weight for layer in block.modules() if is_shrunk(layer, weight_format)]
    num_bytes = WEIGHT_FORMATS[weight_format].num_bytes
    return total + sum(num_bytes(*weight.shape) - stored_bytes(weight) for weight in weights)

"""Run blocks without in-place additions, so that gradients are correct.

FLUX-like blocks add their branches in place (``img += ...``). Autograd has saved the overwritten tensor: a plain
backward raises, and under checkpointing or any saved-tensor hook nothing is detected and the gradients are wrong
(measured on the host's own blocks: by up to 10 %). Inside :class:`OutOfPlace`, Python's ``+=`` and ``*=`` on tensors
create a new tensor instead. The values are bit-identical, and the input tensor is not changed.

A bare ``x.add_(y)`` whose result is not bound to a name would lose its effect here. Blocks that do this to their tokens run
on copies of them and inside :class:`~.reading_copies.ReadingCopies`, which keeps the effect. The tests run every supported
family's blocks with and without these modes.

Cloning the inputs of the norm layers would work too, but this needs no knowledge of the family, and it also leaves the
caller's tensor intact, which checkpointing needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_OUT_OF_PLACE = {
    torch.Tensor.add_: torch.add,
    torch.Tensor.__iadd__: torch.add,
    torch.Tensor.mul_: torch.mul,
    torch.Tensor.__imul__: torch.mul,
    torch.Tensor.sub_: torch.sub,
    torch.Tensor.__isub__: torch.sub,
}
_WITH_BACKWARD: dict[Any, Callable[..., Any]] = {}


def replace_kernels(replacements: Mapping[Any, Callable[..., Any]]) -> None:
    """Run other functions wherever blocks call kernels that have no backward.

    Args:
        replacements: Kernel, as :class:`~torch.overrides.TorchFunctionMode` is given it -> function of the same values
            and arguments whose gradient autograd knows.
    """
    _WITH_BACKWARD.update(replacements)


def with_backward(function: Any) -> Any:
    """Return what runs in the place of a function: itself, unless it is a kernel that has no backward."""
    return _WITH_BACKWARD.get(function, function)


class OutOfPlace(TorchFunctionMode):
    """Context in which in-place addition, subtraction and multiplication of tensors return new tensors.

    The same holds for functions that are called with ``inplace=True``. Kernels without a backward are replaced too, see
    :func:`replace_kernels`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        other: Any = _OUT_OF_PLACE.get(func) or with_backward(func)
        kwargs = kwargs or {}
        if kwargs.get("inplace"):  # torch.nn.functional.silu and its like
            kwargs = {**kwargs, "inplace": False}
        return other(*args, **kwargs)

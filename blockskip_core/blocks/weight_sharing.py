"""Copies of modules that share the original's weights and leave the original unchanged."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def weight_sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree with the same names whose weights share the original's memory.

    Loaders that run under ``torch.inference_mode`` produce inference tensors, which autograd refuses to save. A tensor
    created over the same memory outside inference mode is an ordinary one; the original is not changed. Quantised
    weights that can be taken apart (torch's wrapper subclasses) are rebuilt from such tensors. Packed bytes of other
    classes are kept unchanged: the LoRA layers never save them.
    """
    twin = copy.copy(module)
    twin._parameters = {
        name: own if own is None else weight_sharing_alias(own) for name, own in module._parameters.items()
    }
    twin._buffers = {name: own if own is None else weight_sharing_alias(own) for name, own in module._buffers.items()}
    twin._modules = {name: child and weight_sharing_copy(child) for name, child in module._modules.items()}
    copy_hooks(module, twin)
    rebind_methods(module, twin)
    return twin


def rebind_methods(module: nn.Module, twin: nn.Module) -> None:
    """Bind methods stored as attributes on a module to the copy; otherwise the copy would run the original.

    Hosts leave such attributes behind: replacing a layer's ``forward`` by another function and restoring the method
    turns the method into an attribute.
    """
    for name, value in list(twin.__dict__.items()):
        if isinstance(value, MethodType) and value.__self__ is module:
            twin.__dict__[name] = MethodType(value.__func__, twin)


def copy_hooks(module: nn.Module, twin: nn.Module) -> None:
    """Give a copy the forward hooks of a module, in collections that the two do not share."""
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(twin, hooks, copy.copy(getattr(module, hooks)))


def weight_sharing_alias(tensor: AnyTensor) -> AnyTensor:
    """Return an ordinary tensor over the memory of a possible inference tensor; see :func:`weight_sharing_copy`."""
    if tensor.is_meta:
        return tensor
    with torch.inference_mode(False):
        if is_traceable_wrapper_subclass(tensor):
            return cast(AnyTensor, _alias_parts(tensor))
        if type(tensor) not in (Tensor, nn.Parameter) and not is_unpacked(tensor):
            return tensor
        plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        made = nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain
        return cast(AnyTensor, made)


def is_unpacked(tensor: Tensor) -> bool:
    """Return whether a tensor of another class holds plain numbers rather than packed bytes.

    Some file formats wrap even small plain tensors in their class. These are used as ordinary tensors: results computed
    with them would be of that class too, and such classes may not support ``detach``.
    """
    return tensor.is_floating_point() and tuple(tensor.shape) == tuple(tensor.size())


def _alias_parts(tensor: Tensor) -> Tensor:
    kind: Any = type(tensor)  # torch's protocol for wrapper subclasses is not typed
    names, context = kind.__tensor_flatten__(tensor)
    parts = {name: weight_sharing_alias(getattr(tensor, name)) for name in names}
    twin = kind.__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        twin._is_param = True  # as nn.Parameter does, but without detaching, which copies the scales of some formats
    return twin


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a weight-sharing copy that runs without gradients, because hosts may leave weights trainable.

    It does not wrap the module: a host that finds a layer at this path sets its own attributes on it.
    """
    twin = weight_sharing_copy(module)
    twin.forward = torch.no_grad()(twin.forward)
    return twin


def move_weights(twin: nn.Module, device: torch.device) -> None:
    """Move the weights of a copy or a stand-in to a device, as new tensors, because the model has the old ones too."""
    for layer in twin.modules():
        for name, weight in layer._parameters.items():
            if weight is not None and weight.device != device:
                layer._parameters[name] = nn.Parameter(weight.detach().to(device), requires_grad=False)
        for name, table in layer._buffers.items():
            if table is not None and table.device != device:
                layer._buffers[name] = table.to(device)

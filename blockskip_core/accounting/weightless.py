"""Copies of modules without their weights: the same shapes and classes on the ``meta`` device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..blocks.weight_sharing import is_unpacked, rebind_methods

PACKED = torch.float8_e4m3fn  # represents weights in the host's own formats, which have to be unpacked for use


def weightless_copy(module: nn.Module, *, without: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a copy of a module tree whose tensors have shape and dtype but no memory; the original is not touched.

    Tensor subclasses (quantised weights; not those around plain numbers) become 8-bit tensors of their logical shape,
    so that they are unpacked for every use like the real ones. Their own bytes must be counted on the original.

    Args:
        module: The original.
        without: Attributes that copies must not carry over -> what replaces them, or ``None`` to leave them out.
    """
    return _copy(module, without or {}, {})


def replaced(module: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Return a shallow copy of a module tree with some submodules replaced; the two trees share all others.

    Args:
        module: The original; not touched.
        replacements: Path -> module.
    """
    if "" in replacements:
        return replacements[""]
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, stand_in in replacements.items():
        child, _, rest = path.partition(".")
        below.setdefault(child, {})[rest] = stand_in
    for child, inner in below.items():
        twin._modules[child] = replaced(module.get_submodule(child), inner)
    rebind_methods(module, twin)
    return twin


def _copy(module: nn.Module, without: Mapping[str, Any], seen: dict[int, Any]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    twin = seen[id(module)] = copy.copy(module)
    for name in twin.__dict__.keys() & without.keys():
        if without[name] is None:
            del twin.__dict__[name]
        else:
            twin.__dict__[name] = copy.copy(without[name])
    for name, value in list(twin.__dict__.items()):
        if isinstance(value, Tensor):  # tables that are not registered as buffers
            twin.__dict__[name] = _shape_of(value, seen)
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        setattr(twin, kind, {name: None if value is None else _shape_of(value, seen) for name, value in own.items()})
    twin._modules = {name: child and _copy(child, without, seen) for name, child in module._modules.items()}
    rebind_methods(module, twin)
    return twin


def _shape_of(tensor: Tensor, seen: dict[int, Any]) -> Tensor:
    if id(tensor) in seen:
        return seen[id(tensor)]
    with torch.inference_mode(False):  # hosts load models in inference mode
        if type(tensor) in (Tensor, nn.Parameter) or (
            not is_traceable_wrapper_subclass(tensor) and is_unpacked(tensor)
        ):
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        else:
            made = torch.empty(tensor.shape, dtype=PACKED, device="meta")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=False)
    seen[id(tensor)] = made
    return made

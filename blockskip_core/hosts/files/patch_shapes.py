"""Whether a LoRA's patches fit the weights that they change.

The host finds out only while it samples, and goes on without a patch that does not fit after a line in its log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import LoraFileError

Patches = Mapping[Any, Any]
"""Weight, or (weight, (dim, start, length) of a part of it, ...) -> the host's patch for it."""

Shape = tuple[int, ...]


def weight_of(key: Any) -> str:
    """Return the name of the weight in a patch's key."""
    return key if isinstance(key, str) else key[0]


def without_misfits(patcher: Any, patches: Patches) -> tuple[Patches, list[str]]:
    """Return the patches that fit, and the weights whose full difference has another size.

    The host leaves out a full difference of another size and applies the rest of the file; some files for video models have one
    for the first layer of a model with more channels. LoRA, LoHa and LoKr are checked too; BOFT, GLoRA, OFT and Tucker
    decompositions are left to the host.

    Raises:
        LoraFileError: If a low-rank patch has neither its weight's size nor the size that it widens it to: the file was made for
            another model.
    """
    fitting: dict[Any, Any] = {}
    misfits = []
    # For quantised weights a state dict has the packed shapes, the parameters have the logical ones.
    weights = {**patcher.model.state_dict(), **dict(patcher.model.named_parameters())}
    for key, patch in patches.items():
        name = weight_of(key)
        change = _shape_of_change(name, patch)
        fitting[key] = patch
        if change is None or name not in weights:  # the host does not add what the model lacks
            continue
        shape = _target_shape(key, tuple(weights[name].shape), _widened(patch))
        if shape is not None and _as_matrix(change) == _as_matrix(shape):
            continue
        if isinstance(patch, tuple):
            misfits.append(name)
            del fitting[key]
        else:
            raise LoraFileError(
                f"This LoRA does not fit: for {name} it has {' x '.join(map(str, _as_matrix(change)))}, the model has "
                f"{' x '.join(map(str, shape or weights[name].shape))}. It was trained for a model of another size."
            )
    return fitting, misfits


def _shape_of_change(name: str, patch: Any) -> Shape | None:
    """Return the shape of what a patch adds to a weight, or None for kinds that are not checked."""
    if isinstance(patch, tuple):
        return tuple(patch[1][0].shape) if patch[0] == "diff" else None
    weights = patch.weights
    if patch.name == "lora" and weights[3] is None:
        return _product(name, weights[0], weights[1])
    if patch.name == "loha" and weights[5] is None:
        first, second = _product(name, *weights[0:2]), _product(name, *weights[3:5])
        if first != second:
            raise _damaged(name, first, second)
        return first
    if patch.name == "lokr" and weights[7] is None:
        whole, other, _, *parts = weights[:7]
        first = _product(name, *parts[:2]) if whole is None else _as_matrix(whole.shape)
        second = _product(name, *parts[2:]) if other is None else _as_matrix(other.shape)
        return first[0] * second[0], first[1] * second[1]
    return None


def _product(name: str, up: Tensor, down: Tensor) -> Shape:
    """Return the shape of ``up @ down``, or raise LoraFileError."""
    if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
        raise _damaged(name, tuple(up.shape), tuple(down.shape))
    return up.shape[0], down.flatten(1).shape[1]


def _damaged(name: str, first: Shape, second: Shape) -> LoraFileError:
    return LoraFileError(
        f"This LoRA is damaged: for {name} it has matrices of the shapes {first} and {second}, which do not fit each other."
    )


def _as_matrix(shape: Sequence[int]) -> Shape:
    """Return a weight's rows and columns; a vector has one column."""
    return shape[0], math.prod(shape[1:])


def _widened(patch: Any) -> Sequence[int] | None:
    """Return the shape that a patch widens its weight to, if it does."""
    return (*patch.weights, None)[5] if getattr(patch, "name", "") == "lora" else None


def _target_shape(key: Any, shape: Shape, widened: Sequence[int] | None) -> Shape | None:
    """Return the shape of the patched part, or None if the weight has no such part or would have to shrink."""
    part = None if isinstance(key, str) else key[1]
    if part is not None:
        dim, start, length = part
        return None if start + length > shape[dim] else (*shape[:dim], length, *shape[dim + 1 :])
    if widened is None:
        return shape
    grows = len(widened) == len(shape) and all(new >= old for new, old in zip(widened, shape, strict=True))
    return tuple(widened) if grows else None

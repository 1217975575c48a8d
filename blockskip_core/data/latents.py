"""The clean latents of all training examples: one tensor if all have one shape, otherwise a list.

Examples differ in shape if training pictures keep the shape of their pictures, or if pictures and clips of a video model
are trained together. Examples that go through the model in one batch have one shape.

Axis legend: ``C H W`` latent channels (times frames), rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Latents: TypeAlias = Tensor | Sequence[Tensor]
"""Indexed by draw, each (C, H, W)."""


def joined(latents: Iterable[Tensor]) -> Latents:
    """Return the latents of all draws, each (C, H, W), in one tensor if they have one shape."""
    each = list(latents)
    return torch.stack(each) if len({one.shape for one in each}) == 1 else each


def in_batch(latents: Latents, draws: Sequence[int]) -> Tensor:
    """Return the latents of some draws of one shape, (B, C, H, W)."""
    return torch.stack([latents[draw] for draw in draws])


def largest_shape(latents: Latents) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the draws with the most numbers, which need the most memory."""
    channels, rows, columns = max((one.shape for one in latents), key=torch.Size.numel)
    return channels, rows, columns


def total_bytes(latents: Latents) -> int:
    """Return the bytes of all latents."""
    return sum(one.nbytes for one in latents)


def are_equal(a: Latents, b: Latents) -> bool:
    """Return whether two sets of latents are the same, bit for bit."""
    return len(a) == len(b) and all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(a, b, strict=True)
    )


def as_tensors(latents: Latents) -> Sequence[Tensor]:
    """Return the tensors that latents are held in: one for all draws, or one for each."""
    return [latents] if isinstance(latents, Tensor) else latents


def shapes_in_words(latents: Latents) -> str:
    """Return the shape of the tensor, or the shapes in a list."""
    if isinstance(latents, Tensor):
        return str(tuple(latents.shape))
    shapes = list(dict.fromkeys(tuple(one.shape) for one in latents))
    return f"{len(latents)} of shape " + ", ".join(map(str, shapes[:3])) + (" and others" if len(shapes) > 3 else "")


def without_values(shapes: Iterable[Sequence[int]]) -> Latents:
    """Return latents of these shapes on ``meta``, to plan with before there are any."""
    return joined(torch.empty(tuple(shape), device="meta") for shape in shapes)

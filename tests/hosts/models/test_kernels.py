"""The rotations that run in the place of comfy_kitchen's kernels, against the rotation of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

kitchen = pytest.importorskip("comfy_kitchen")
pytestmark = pytest.mark.usefixtures("comfyui")

EPSILON = 1e-6
BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles() -> Tensor:
    """One angle for each token and pair of numbers, shape (1, 1, TOKENS, WIDTH / 2)."""
    return random(1, 1, TOKENS, WIDTH // 2, seed=1)


def matrices() -> Tensor:
    """The same rotations as matrices, shape (1, 1, TOKENS, WIDTH / 2, 2, 2), as the host gives them to its kernels."""
    cos, sin = angles().cos(), angles().sin()
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def rotated(x: Tensor, halves: bool) -> Tensor:
    """Each pair of numbers, neighbours or from the two halves, as a complex number times exp(i angle)."""
    real, imaginary = x.chunk(2, dim=-1) if halves else (x[..., 0::2], x[..., 1::2])
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles()), angles())
    parts = turned.real, turned.imag
    return torch.cat(parts, dim=-1) if halves else torch.stack(parts, dim=-1).flatten(-2)


def normed(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt() * scale


@pytest.mark.parametrize("halves", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("pair", [False, True], ids=["one", "queries and keys"])
def test_values_and_gradients_are_those_of_the_formula(halves, norm, pair):
    from blockskip_pack.blockskip_core.blocks.out_of_place import OutOfPlace
    from blockskip_pack.blockskip_core.hosts.models.kernels import kernels_with_backward

    name = ("rms_rope" if norm else "apply_rope") + "_split_half" * halves + "1" * (not pair)
    kernel = getattr(torch.ops.comfy_kitchen, name, None)
    if kernel not in kernels_with_backward():
        pytest.skip(f"this comfy_kitchen has no {name}")
    tokens = [random(BATCH, HEADS, TOKENS, WIDTH, seed=2 + i).requires_grad_() for i in range(1 + pair)]
    scales = [random(WIDTH, seed=4 + i).requires_grad_() for i in range(1 + pair)] if norm else []
    with OutOfPlace():
        found = kernel(*tokens, matrices(), *scales, *([EPSILON] if norm else []))
    found = found if pair else (found,)
    inputs = [normed(*both) for both in zip(tokens, scales, strict=True)] if norm else tokens
    expected = [rotated(x, halves) for x in inputs]
    torch.testing.assert_close(list(found), expected, atol=1e-14, rtol=1e-12)
    weights = [random(*x.shape, seed=6 + i) for i, x in enumerate(expected)]
    gradients = [torch.autograd.grad(outputs, [*tokens, *scales], weights) for outputs in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=1e-12)

"""Count on ``meta`` tensors what a GPU's fused kernels keep for the backward pass.

Torch chooses kernels by device. For ``meta`` it chooses plain operations, which keep more: the matrix of scores in
attention, and a float32 copy of the input in RMS norm. In these contexts ``meta`` tensors are counted as on a GPU.

Enter them inside the counted module: a recomputation in backward does not see contexts around the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def has_fused_rms_norm(device: torch.device) -> bool:
    """Return whether torch has a differentiable RMS norm in one kernel: on CUDA and ROCm, since 2.9."""
    fused = getattr(aten, "_fused_rms_norm", None)
    return device.type == "cuda" and fused is not None and len(fused.default._schema.returns) == 2


class FusedAttention(TorchFunctionMode):
    """Context in which attention on ``meta`` is counted as a fused kernel: without a matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class FusedRmsNorm(TorchFunctionMode):
    """Context in which RMS norm on ``meta`` is counted as a fused kernel: without a float32 copy.

    Like torch's kernel, it does not take a weight whose dtype differs from the input's; then plain operations are used.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is functional.rms_norm and args[0].is_meta:
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def with_fused_kernels(module: nn.Module, rms_norm: bool) -> None:
    """Make a module without weights, and its copies, run with fused kernels; its class keeps its name.

    Args:
        module: On ``meta``.
        rms_norm: Whether RMS norm is fused too; see :func:`has_fused_rms_norm`.
    """
    kind = type(module)
    modes = (FusedAttention, FusedRmsNorm) if rms_norm else (FusedAttention,)
    module.__class__ = type(
        kind.__name__, (kind,), {"forward": _inside(modes, kind.forward), "__module__": kind.__module__}
    )


def _inside(modes: Sequence[type[TorchFunctionMode]], forward: Any) -> Any:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            return forward(self, *args, **kwargs)

    return run


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is not None and weight.dtype != x.dtype:
        return functional.rms_norm(x, list(shape), weight, eps)
    return _RmsNorm.apply(x, weight, len(shape))


class _RmsNorm(torch.autograd.Function):
    """Shapes of what torch's kernel allocates and keeps: the input, the weight and a factor per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, normalized_dims: int) -> Tensor:
        """Return the output, and keep one float32 factor per normalised row."""
        factors = x.new_empty((*x.shape[:-normalized_dims], *(1,) * normalized_dims), dtype=torch.float32)
        ctx.save_for_backward(x, weight, factors)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the requested gradients."""
        x, weight, _ = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        return torch.empty_like(x) if wants_x else None, torch.empty_like(weight) if wants_weight else None, None

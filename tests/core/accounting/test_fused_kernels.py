"""Tensors without memory keep as much for the backward pass as a GPU's kernels do."""

from __future__ import annotations

import copy

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.fused_kernels import FusedRmsNorm, has_fused_rms_norm, with_fused_kernels
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.blocks.saved_bytes import SavedBytes
from torch import nn
from torch.nn.functional import rms_norm
from torch.utils.checkpoint import checkpoint

TOKENS, WIDTH = 100, 64


def saved_bytes(run) -> int:
    saved = SavedBytes()
    with saved.counting():
        run()
    return saved.total


def tokens(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(1, TOKENS, WIDTH, dtype=dtype, device="meta", requires_grad=True)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(WIDTH, dtype=dtype, device="meta", requires_grad=True)


def test_a_fused_norm_keeps_its_input_its_weight_and_a_number_per_token():
    x, scale = tokens(), weight()
    with FusedRmsNorm():
        assert saved_bytes(lambda: rms_norm(x, (WIDTH,), scale, 1e-6)) == x.nbytes + scale.nbytes + TOKENS * 4
        assert saved_bytes(lambda: rms_norm(x, (WIDTH,))) == x.nbytes + TOKENS * 4
    assert saved_bytes(lambda: rms_norm(x, (WIDTH,), scale, 1e-6)) > 3 * x.nbytes  # as in torch on the CPU


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch warns the same about its own kernel
def test_the_kernel_does_not_take_a_weight_of_another_dtype():
    x, scale = tokens(), weight(torch.float32)
    plain = saved_bytes(lambda: rms_norm(x, (WIDTH,), scale))
    with FusedRmsNorm():
        assert saved_bytes(lambda: rms_norm(x, (WIDTH,), scale)) == plain


def test_gradients_have_the_shapes_and_dtypes_of_what_they_are_of():
    x, scale = tokens(), weight()
    with FusedRmsNorm():
        y = rms_norm(x, (WIDTH,), scale)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    assert (scale.grad.shape, scale.grad.dtype) == (scale.shape, scale.dtype)


def test_tensors_with_numbers_are_left_to_torch():
    x = torch.randn(3, WIDTH)
    with FusedRmsNorm():
        assert torch.equal(rms_norm(x, (WIDTH,)), rms_norm(x, (WIDTH,)))
        torch.testing.assert_close(rms_norm(x, (WIDTH,)), x / x.pow(2).mean(-1, keepdim=True).sqrt())


@pytest.mark.parametrize("copied", [False, True])
def test_a_module_is_counted_so_in_its_recomputation_too(copied):
    module = nn.Sequential(nn.RMSNorm(WIDTH, device="meta", dtype=torch.bfloat16))
    with_fused_kernels(module, rms_norm=True)
    module = copy.copy(module) if copied else module
    assert type(module).__name__ == "Sequential"
    assert isinstance(module, nn.Sequential)
    x = tokens()
    one = x.nbytes
    with Counting() as counting:
        y = checkpoint(module, x, use_reentrant=False)
        counting.reset_peak()
        y.backward(torch.empty_like(y))
    assert counting.peak(x.device) < 5 * one  # the output and three gradients or outputs; a float32 copy alone is two


def test_only_cards_have_the_kernel():
    assert not has_fused_rms_norm(torch.device("cpu"))
    assert not has_fused_rms_norm(torch.device("mps"))

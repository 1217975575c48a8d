"""Running blocks that write into their input so that gradients are correct."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.out_of_place import OutOfPlace
from torch.utils.checkpoint import checkpoint

from ..plain_dit import PlainDit


def in_place(x, weight):
    x += torch.sin(x) * weight
    x *= torch.exp(-x * x)
    x -= weight * x.square()
    return x


def out_of_place(x, weight):
    x = x + torch.sin(x) * weight
    x = x * torch.exp(-x * x)
    return x - weight * x.square()


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def gradients(function, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = function(x * 1.0, weight)
    return torch.autograd.grad(output.square().sum(), (x, weight))


def guarded(x, weight):
    with OutOfPlace():
        return in_place(x, weight)


def test_the_values_are_the_same_to_the_last_bit():
    x, weight = inputs()
    assert torch.equal(guarded(x.clone(), weight), in_place(x.clone(), weight))


def test_the_callers_tensor_is_left_alone():
    x, weight = inputs()
    before = x.clone()
    guarded(x, weight)
    assert torch.equal(x, before)
    in_place(x, weight)
    assert not torch.equal(x, before)


def test_gradients_are_right_where_plain_backward_raises():
    x, weight = inputs()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(in_place, x, weight)
    for got, expected in zip(gradients(guarded, x, weight), gradients(out_of_place, x, weight), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0.0)


def test_gradients_are_right_under_checkpointing():
    x, weight = inputs()
    checkpointed = gradients(lambda x, weight: checkpoint(guarded, x, weight, use_reentrant=False), x, weight)
    for got, expected in zip(checkpointed, gradients(out_of_place, x, weight), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0.0)


def test_the_methods_behind_the_operators_are_covered():
    x = torch.ones(2)
    with OutOfPlace():
        assert x.add_(1.0).tolist() == [2.0, 2.0]
        assert x.add_(1.0, alpha=3).tolist() == [4.0, 4.0]
        assert x.mul_(5.0).tolist() == [5.0, 5.0]
        assert x.sub_(3.0).tolist() == [-2.0, -2.0]
    assert x.tolist() == [1.0, 1.0]


def test_the_mode_ends_with_its_context():
    x = torch.ones(2)
    with pytest.raises(KeyError), OutOfPlace():
        raise KeyError
    x += 1.0
    alias = x
    alias += 1.0
    assert x.tolist() == [3.0, 3.0]


def test_both_kinds_of_blocks_give_the_same_bits_with_and_without():
    dit = PlainDit()
    img, txt, vec = dit.net.embed(
        torch.randn(2, 3, 2, 3).double(), torch.tensor([0.3, 0.8]).double(), torch.cat(dit.captions[:2])
    )
    double, single = dit.net.double_blocks[0], dit.net.single_blocks[0]
    plain = double(img=img.clone(), txt=txt.clone(), vec=vec)
    with OutOfPlace():
        kept = double(img=img, txt=txt, vec=vec)
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
    tokens = torch.cat((txt, img), dim=1)
    plain = single(tokens.clone(), vec, num_text=txt.shape[1])
    with OutOfPlace():
        assert torch.equal(single(tokens, vec, num_text=txt.shape[1]), plain)

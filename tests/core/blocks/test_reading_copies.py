"""Running blocks that overwrite their tokens so that gradients are correct."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.out_of_place import OutOfPlace
from blockskip_pack.blockskip_core.blocks.reading_copies import ReadingCopies
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint


def overwriting(x, weight):
    """Adds to ``x`` in all ways that ComfyUI's blocks do; returns it."""
    x += torch.sin(x) * weight
    x.addcmul_(rms_norm(x, x.shape[-1:]), weight)
    x.view(-1)[2:9].mul_(torch.exp(-x.square().mean()))
    x[1:].add_(torch.cat([x[:1].square(), silu(x[:1], inplace=True)]))
    x[0] = x[1] * weight[0]
    return rms_norm(x, x.shape[-1:]).add_(x)


def out_of_place(x, weight):
    """The same without overwriting anything."""
    x = x + torch.sin(x) * weight
    x = x + rms_norm(x, x.shape[-1:]) * weight
    flat = x.reshape(-1)
    scaled = flat[2:9] * torch.exp(-x.square().mean())
    x = torch.cat([flat[:2], scaled, flat[9:]]).view_as(x)
    x = torch.cat([x[:1], x[1:] + torch.cat([x[:1].square(), silu(x[:1])])])
    x = torch.cat([(x[1] * weight[0])[None], x[1:]])
    return rms_norm(x, x.shape[-1:]) + x


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def guarded(x, weight):
    copy = x.clone()
    with ReadingCopies([copy]):
        return overwriting(copy, weight)


def gradients(function, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = function(x * 1.0, weight)
    return torch.autograd.grad(output.square().sum(), (x, weight))


def test_the_values_are_the_same_to_the_last_bit_and_the_callers_tensor_is_left_alone():
    x, weight = inputs()
    before = x.clone()
    with torch.no_grad():
        expected = guarded(x, weight)
    assert torch.equal(guarded(x, weight.requires_grad_()), expected)
    assert torch.equal(x, before)
    torch.testing.assert_close(expected, out_of_place(x, weight), atol=1e-13, rtol=0.0)


def test_running_out_of_place_would_lose_what_is_added():
    x, weight = inputs()
    with OutOfPlace():
        lost = overwriting(x.clone(), weight)
    assert (lost - out_of_place(x, weight)).abs().max() > 0.1


def test_gradients_are_right_where_plain_backward_raises():
    x, weight = inputs()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(overwriting, x, weight)
    for got, expected in zip(gradients(guarded, x, weight), gradients(out_of_place, x, weight), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0.0)


def test_gradients_are_the_same_if_everything_is_computed_again():
    x, weight = inputs()
    again = gradients(lambda *given: checkpoint(guarded, *given, use_reentrant=False), x, weight)
    assert all(torch.equal(got, expected) for got, expected in zip(again, gradients(guarded, x, weight), strict=True))


def test_other_tensors_are_not_copied(monkeypatch):
    x, weight = inputs()
    copied = []
    own = ReadingCopies([x])
    monkeypatch.setattr(ReadingCopies, "_copied", lambda self, values, plain=ReadingCopies._copied: (
        copied.extend(found := plain(self, values)) or found
    ))  # fmt: skip
    with own:
        weight.sin() + weight.view(-1)[0]
    assert not [entry for entry in copied[1::2] if entry]

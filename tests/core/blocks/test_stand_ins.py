"""The modules that stand in for blocks, one by one."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.stand_ins import (
    AddResidual,
    PassThrough,
    Replay,
    ReplayFront,
    TrainedBlock,
    frozen_copy,
    weight_sharing_copy,
)
from blockskip_pack.blockskip_core.model import TokenStreams
from torch import nn

from ..plain_dit import DoubleIO, PlainDit, SingleIO

BATCH, IMAGE, TEXT, WIDTH = 2, 6, 5, 8


def streams(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TokenStreams(
        torch.randn(BATCH, IMAGE, WIDTH, generator=generator), torch.randn(BATCH, TEXT, WIDTH, generator=generator)
    )


def call(kind, stand_in, given):
    """Return the tokens that leave a stand-in of either kind of block."""
    if kind == "double":
        return TokenStreams(*stand_in(img=given.img, txt=given.txt, vec=None))
    out = stand_in(torch.cat((given.txt, given.img), dim=1), None, num_text=TEXT)
    return TokenStreams(out[:, TEXT:], out[:, :TEXT])


KINDS = pytest.mark.parametrize(
    ("kind", "io"), [("double", DoubleIO()), ("single", SingleIO())], ids=["double", "single"]
)


@KINDS
def test_tokens_pass_through_unchanged(kind, io):
    given = streams()
    out = call(kind, PassThrough(io), given)
    assert torch.equal(out.img, given.img)
    assert torch.equal(out.txt, given.txt)


@KINDS
def test_the_stored_front_replaces_whatever_comes_and_survives_being_written_into(kind, io):
    stored = streams(1)
    kept = stored.map(torch.clone)
    out = call(kind, ReplayFront(io, Replay(front=stored)), streams())
    assert torch.equal(out.img, kept.img)
    assert torch.equal(out.txt, kept.txt)
    out.img.zero_()
    out.txt.zero_()
    assert torch.equal(stored.img, kept.img)
    assert torch.equal(stored.txt, kept.txt)


@KINDS
def test_the_stored_residual_is_added_to_the_image_with_gradient_one(kind, io):
    given, back = streams(), torch.randn(BATCH, IMAGE, WIDTH)
    img = given.img.clone().requires_grad_()
    out = call(kind, AddResidual(io, Replay(back=back)), TokenStreams(img, given.txt))
    assert torch.equal(out.img, given.img + back)
    assert torch.equal(out.txt, given.txt)
    upstream = torch.randn(BATCH, IMAGE, WIDTH)
    assert torch.equal(torch.autograd.grad(out.img, img, upstream)[0], upstream)


@KINDS
def test_stored_tokens_take_the_dtype_of_the_stream(kind, io):
    stored = streams(1)
    out = call(kind, ReplayFront(io, Replay(front=stored)), streams().map(lambda x: x.bfloat16()))
    assert out.img.dtype == torch.bfloat16
    out = call(kind, AddResidual(io, Replay(back=stored.img)), streams().map(lambda x: x.bfloat16()))
    assert out.img.dtype == torch.bfloat16


def test_the_weightless_ones_hold_no_weights():
    for module in (PassThrough(DoubleIO()), ReplayFront(DoubleIO(), Replay()), AddResidual(DoubleIO(), Replay())):
        assert not list(module.parameters())
        assert not list(module.buffers())


def test_a_copy_shares_memory_and_nothing_else():
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = weight_sharing_copy(original)
    assert list(twin.state_dict()) == list(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert twin.state_dict()[name].data_ptr() == tensor.data_ptr()
    twin[0].register_forward_hook(lambda *_: None)
    twin[0].mark = 1
    twin[0].weight = nn.Parameter(torch.zeros(4, 3))
    assert not original[0]._forward_hooks
    assert not hasattr(original[0], "mark")
    assert original[0].weight.any()


def test_a_copy_keeps_the_strides_and_the_offset_of_a_view():
    original = nn.Linear(3, 4)
    original.weight = nn.Parameter(torch.arange(100.0)[10:90].view(8, 10)[::2, 1:7:2])
    twin = weight_sharing_copy(original)
    assert torch.equal(twin.weight, original.weight)
    assert twin.weight.data_ptr() == original.weight.data_ptr()


class Marked(nn.Parameter):
    """A parameter of another class that says to be a larger matrix than it takes numbers, as packed weights do."""

    @property
    def shape(self):
        return torch.Size((4, 6))


class Dressed(nn.Parameter):
    """Plain numbers in another class, as some files give small tensors."""


def test_plain_numbers_in_another_class_become_an_ordinary_tensor_over_the_same_memory():
    original = nn.Linear(3, 4)
    original.weight = Dressed(torch.randn(4, 3))
    twin = weight_sharing_copy(original).weight
    assert type(twin) is nn.Parameter
    assert twin.data_ptr() == original.weight.data_ptr()
    assert type(original.weight) is Dressed


def test_a_frozen_copy_runs_without_gradients_also_over_weights_that_are_kept_as_they_are():
    original = nn.Linear(3, 4)
    original.weight = Marked(torch.randn(4, 3))
    x = torch.randn(2, 3, requires_grad=True)
    frozen = frozen_copy(original)
    assert frozen.weight is original.weight
    assert torch.equal(frozen(x), original(x))
    assert not frozen(x).requires_grad
    assert original(x).requires_grad


def test_a_frozen_copy_can_be_marked_and_unmarked_where_a_host_finds_it():
    """Hosts write onto the layer at a path, read it in the layer's own forward, and delete it again."""

    class Layer(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    original = Layer(3, 4)
    frozen, x = frozen_copy(original), torch.randn(2, 3)
    frozen.factor = 2.0
    assert torch.equal(frozen(x), 2.0 * original(x))
    del frozen.factor
    assert torch.equal(frozen(x), original(x))


def test_a_trained_block_leaves_the_callers_tokens_and_the_block_alone():
    block = PlainDit().module("double_blocks.0")
    given = streams().map(lambda x: x.double())
    kept, vec = given.map(torch.clone), torch.randn(BATCH, 1, WIDTH).double()
    for checkpointed in (False, True):
        stand_in = TrainedBlock(block, checkpointed=checkpointed)
        out = stand_in(img=given.img.clone().requires_grad_(), txt=given.txt, vec=vec)
        assert torch.equal(given.txt, kept.txt)
        expected = block(img=given.img.clone(), txt=given.txt.clone(), vec=vec)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0.0)
        out[0].sum().backward()
        assert all(p.grad is None for p in block.parameters())

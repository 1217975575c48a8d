"""The modules that replace blocks, one by one."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.replay import Replay
from blockskip_pack.blockskip_core.blocks.stand_ins import AddResidual, PassThrough, ReplayFront, TrainedBlock
from blockskip_pack.blockskip_core.model import TokenStreams

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

"""Residuals computed block by block, and replayed in place of the blocks."""

import dataclasses

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.replay import Residual
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.blocks.stand_ins import RecordingBlock
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.data.micro_batches import batches_of_equal_text
from blockskip_pack.blockskip_core.errors import TrainingError
from blockskip_pack.blockskip_core.model import TokenStreams
from blockskip_pack.blockskip_core.residuals.precompute import _runs_that_fit, precompute_residuals
from blockskip_pack.blockskip_core.selection.selection import BlockSelection

from ..plain_dit import TEXT_LENGTHS, WIDTH, PlainDit, latents, reference_denoise, schedule, selection

NUM_BLOCKS = 5
SPANS = [(n, m) for n in range(NUM_BLOCKS) for m in range(NUM_BLOCKS - n)]
EXACT = {"atol": 1e-12, "rtol": 0.0}  # float64 rounding


def inputs(plan, clean, draws):
    noisy, _, sigmas = noisy_batch(plan, clean, draws)
    return noisy, sigmas, [plan[draw].caption for draw in draws]


def full_model(dit, plan, clean, draws):
    """The plain model's output with frozen weights, because torch's choice of kernels depends on requires_grad."""
    dit.net.requires_grad_(False)
    with torch.no_grad():
        return dit.denoise(*inputs(plan, clean, draws))


def replayed(dit, chosen, residuals, plan, clean, draws):
    """The model's output with the skipped spans replayed."""
    model = SkippingModel(dit, chosen, checkpointed=False, folded=False)
    model.replay(residuals.__getitem__, draws, None)
    with torch.no_grad(), dit.running(model.modules) as denoise:
        return denoise(*inputs(plan, clean, draws))


def test_the_reference_of_the_tests_is_the_model():
    dit, plan, clean = PlainDit(), schedule(), latents()
    given = inputs(plan, clean, [0, 1])
    torch.testing.assert_close(reference_denoise(dit, *given), dit.denoise(*given), **EXACT)


@pytest.mark.parametrize(("front", "back"), SPANS)
def test_front_middle_and_back_together_are_the_full_model(front, back):
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(front, back)
    residuals = precompute_residuals(dit, plan, clean, chosen, range(4)).residuals
    full = full_model(dit, plan, clean, range(4))
    skipping = replayed(dit, chosen, residuals, plan, clean, range(4))
    if back:
        torch.testing.assert_close(skipping, full, **EXACT)
    else:
        torch.testing.assert_close(skipping, full, atol=1e-14, rtol=0.0)  # row by row and batched round differently


@pytest.mark.parametrize(
    ("front", "back", "tail"), [(n, m, k) for n, m in SPANS for k in range(1, 4) if m and n + m + k < 5]
)
def test_a_span_before_a_tail_is_replayed_exactly_in_image_and_text(front, back, tail):
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(front, back, tail=tail)
    computed = precompute_residuals(dit, plan, clean, chosen, range(4))
    full = full_model(dit, plan, clean, range(4))
    torch.testing.assert_close(replayed(dit, chosen, computed.residuals, plan, clean, range(4)), full, **EXACT)
    torch.testing.assert_close(computed.reference.denoised, full[:1], **EXACT)
    without = {draw: dataclasses.replace(one, back_txt=None) for draw, one in computed.residuals.items()}
    assert not torch.allclose(replayed(dit, chosen, without, plan, clean, range(4)), full, atol=1e-4)


def test_draws_pass_the_tail_only_for_the_reference(monkeypatch):
    passes = []
    run = RecordingBlock.forward
    monkeypatch.setattr(RecordingBlock, "forward", lambda self, *a, **k: passes.append(1) or run(self, *a, **k))
    dit, plan, clean = PlainDit(), schedule(), latents()
    precompute_residuals(dit, plan, clean, selection(1, 1, tail=2), range(4))
    assert len(passes) == 3 * 4 + 1  # three blocks for four draws, one of the tail; the last pass records nothing


@pytest.mark.parametrize(("double", "single"), [(0, 4), (4, 0), (1, 1)])
def test_models_of_one_kind_of_block_are_served(double, single):
    dit, plan, clean = PlainDit(double, single), schedule(), latents()
    count = double + single
    for front, back in ((n, m) for n in range(count) for m in range(count - n)):
        chosen = selection(front, back, count)
        residuals = precompute_residuals(dit, plan, clean, chosen, range(4)).residuals
        full = full_model(dit, plan, clean, range(4))
        torch.testing.assert_close(replayed(dit, chosen, residuals, plan, clean, range(4)), full, **EXACT)


def test_with_nothing_skipped_the_model_is_the_plain_one_bit_for_bit():
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(0, 0)
    computed = precompute_residuals(dit, plan, clean, chosen, range(4))
    assert all(not residual.tensors() for residual in computed.residuals.values())
    full = full_model(dit, plan, clean, [0, 1])
    assert torch.equal(replayed(dit, chosen, computed.residuals, plan, clean, [0, 1]), full)


@pytest.mark.parametrize("front", range(1, NUM_BLOCKS))
def test_a_front_alone_is_exact_to_the_last_bit(front):
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(front, 0)
    residuals = precompute_residuals(dit, plan, clean, chosen, range(4)).residuals
    for draw in range(4):
        full = full_model(dit, plan, clean, [draw])
        assert torch.equal(replayed(dit, chosen, residuals, plan, clean, [draw]), full)


def test_what_is_stored_is_the_output_of_the_front_and_what_the_back_adds():
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(3, 1)
    residuals = precompute_residuals(dit, plan, clean, chosen, range(4)).residuals
    seen = {}
    hooks = [
        dit.module(name).register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out.clone()))
        for name in ("single_blocks.0", "single_blocks.1", "single_blocks.2")
    ]
    full_model(dit, plan, clean, [2])
    for hook in hooks:
        hook.remove()
    length = TEXT_LENGTHS[0]
    stored = residuals[2]
    torch.testing.assert_close(stored.front.img, seen["single_blocks.0"][:, length:], **EXACT)
    torch.testing.assert_close(stored.front.txt, seen["single_blocks.0"][:, :length], **EXACT)
    added = (seen["single_blocks.2"] - seen["single_blocks.1"])[:, length:]
    torch.testing.assert_close(stored.back, added, **EXACT)
    assert stored.front.img.shape == (1, 6, WIDTH)


def test_the_reference_is_the_full_models_output_for_the_first_draw():
    dit, plan, clean = PlainDit(), schedule(), latents()
    for front, back in SPANS:
        computed = precompute_residuals(dit, plan, clean, selection(front, back), [2, 3])
        assert computed.reference.draw == 2
        torch.testing.assert_close(computed.reference.denoised, full_model(dit, plan, clean, [2]), **EXACT)


@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_batches_give_the_same_residuals_also_with_texts_of_several_lengths(batch_size):
    plan, clean = schedule((0.3, 0.9, 0.5, 0.7, 0.2), (0, 2, 1, 2, 0)), latents(5)
    dit, chosen = PlainDit(), selection(1, 2)
    one = precompute_residuals(dit, plan, clean, chosen, range(5)).residuals
    many = precompute_residuals(dit, plan, clean, chosen, range(5), batch_size=batch_size).residuals
    for draw in range(5):
        for name, tensor in one[draw].tensors().items():
            torch.testing.assert_close(many[draw].tensors()[name], tensor, **EXACT)
        assert one[draw].front.txt.shape[1] == TEXT_LENGTHS[plan[draw].caption]


def test_only_the_draws_asked_for_are_computed_and_each_once():
    computed = precompute_residuals(PlainDit(), schedule(), latents(), selection(1, 1), [3, 1, 3])
    assert list(computed.residuals) == [3, 1]


def test_one_real_block_at_a_time_is_in_the_model():
    dit, plan, clean = PlainDit(), schedule(), latents()
    held = []
    running = dit.running

    def watched(replacements, **settings):
        with_weights = [name for name, module in replacements.items() if any(True for _ in module.parameters())]
        held.append([name for name in with_weights if name not in (*dit.frozen_stem, *dit.trainable_head)])
        assert replacements.keys() == {*(block.name for block in dit.blocks), *dit.frozen_stem, *dit.trainable_head}
        return running(replacements, **settings)

    dit.running = watched
    precompute_residuals(dit, plan, clean, selection(1, 2), range(4))
    assert held == [[block.name] for block in dit.blocks]


@pytest.mark.parametrize(
    ("room", "cut", "expected"),
    [
        (0, 0, [1, 1, 1, 1]),
        (7, 0, [2, 1, 1]),
        (8, 0, [2, 2]),
        (100, 0, [4]),
        (100, 3, [3, 1]),
        (8, 1, [1, 1, 2]),
        (100, 4, [4]),
    ],
)
def test_blocks_go_together_as_far_as_they_fit_and_not_across_the_cut(room, cut, expected):
    runs = list(_runs_that_fit([3, 4, 5, 3], room, cut))
    assert [len(run) for run in runs] == expected
    assert [index for run in runs for index in run] == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spans", [(0, 0), (3, 0), (0, 2), (1, 2), (2, 2)])
def test_blocks_that_go_together_leave_the_same_bits_as_one_at_a_time(spans, dtype, batch_size):
    dit, plan, clean = PlainDit(dtype=dtype), schedule(), latents(dtype=dtype)
    settings = {"batch_size": batch_size, "keep_entering": True}
    one = precompute_residuals(dit, plan, clean, selection(*spans), range(4), **settings)
    for blocks_at_once in (2, 3, NUM_BLOCKS):
        room = max(block.num_bytes for block in dit.blocks) * blocks_at_once
        more = precompute_residuals(dit, plan, clean, selection(*spans), range(4), room=room, **settings)
        assert torch.equal(more.reference.denoised, one.reference.denoised)
        assert more.entering.keys() == one.entering.keys()
        assert all(torch.equal(more.entering[draw], one.entering[draw]) for draw in one.entering)
        for draw in range(4):
            expected = one.residuals[draw].tensors()
            assert more.residuals[draw].tensors().keys() == expected.keys()
            assert all(torch.equal(x, expected[name]) for name, x in more.residuals[draw].tensors().items())


def test_with_room_for_all_blocks_the_model_runs_once_per_draw_and_can_be_interrupted_between_draws():
    dit, calls = PlainDit(), []
    denoise, before = dit.denoise, dit.weights_hash()
    dit.denoise = lambda *args: calls.append(args) or denoise(*args)
    seen = []

    def interrupt(done, total):
        seen.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute_residuals(dit, schedule(), latents(), selection(1, 2), range(4), room=10**9, progress=interrupt)
    assert seen == [(1, NUM_BLOCKS), (2, NUM_BLOCKS), (3, NUM_BLOCKS)]
    assert dit.weights_hash() == before
    assert not any(isinstance(module, RecordingBlock) for module in dit.net.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_residuals_are_ordinary_tensors_whatever_mode_the_host_is_in(mode):
    with mode():
        computed = precompute_residuals(PlainDit(), schedule(), latents(), selection(1, 2), range(2))
    for residual in computed.residuals.values():
        for tensor in residual.tensors().values():
            assert not tensor.is_inference()
            assert not tensor.requires_grad


def test_the_model_is_left_as_it_was_also_after_an_interrupt():
    dit = PlainDit()
    before, modules = dit.weights_hash(), dit.modules_by_name()

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute_residuals(dit, schedule(), latents(), selection(1, 2), range(4), progress=interrupt)
    assert dit.weights_hash() == before
    assert all(dit.modules_by_name()[name] is module for name, module in modules.items())


def test_progress_counts_the_blocks():
    seen = []
    precompute_residuals(
        PlainDit(), schedule(), latents(), selection(1, 0), range(2), progress=lambda *count: seen.append(count)
    )
    assert seen == [(done, NUM_BLOCKS) for done in range(1, NUM_BLOCKS + 1)]


@pytest.mark.parametrize(("spans", "named"), [((1, 0), "front.img"), ((0, 1), "back")])
def test_tokens_that_are_not_finite_are_refused(spans, named):
    dit, clean = PlainDit(), latents()
    clean[1] = float("nan")
    with pytest.raises(TrainingError, match=f"{named} tokens of training example 1 are not finite"):
        precompute_residuals(dit, schedule(), clean, selection(*spans), range(4))


def test_back_residuals_are_summed_wide_and_stored_in_the_streams_dtype():
    dit, plan, clean = PlainDit(0, 12, dtype=torch.bfloat16), schedule(), latents(dtype=torch.bfloat16)
    chosen = BlockSelection(front=0, back=11, num_blocks=12)
    computed = precompute_residuals(dit, plan, clean, chosen, [0]).residuals[0]
    assert computed.back.dtype == torch.bfloat16
    wide = PlainDit(0, 12, dtype=torch.bfloat16)
    seen = []
    hooks = [
        wide.module(f"single_blocks.{i}").register_forward_hook(lambda _, a, out: seen.append(out.clone()))
        for i in range(12)
    ]
    wide.denoise(*inputs(plan, clean, [0]))
    for hook in hooks:
        hook.remove()
    expected = sum((b.float() - a.float() for a, b in zip(seen, seen[1:], strict=False)), torch.zeros(()))
    assert torch.equal(computed.back, expected[:, TEXT_LENGTHS[0] :].bfloat16())


def test_noisy_latents_are_those_of_a_rectified_flow():
    plan, clean = schedule(), latents()
    noisy, picked, sigmas = noisy_batch(plan, clean, [3, 1])
    assert torch.equal(picked, clean[[3, 1]])
    assert sigmas.tolist() == [0.7, 0.9]
    for row, draw in enumerate((3, 1)):
        sigma = plan[draw].sigma
        expected = (1 - sigma) * clean[draw] + sigma * plan[draw].noise(clean.shape[1:], torch.float64)
        torch.testing.assert_close(noisy[row], expected, atol=1e-15, rtol=0.0)


def test_batches_hold_equal_texts_in_order():
    lengths = {0: 5, 1: 4, 2: 5, 3: 5, 4: 4}
    assert batches_of_equal_text(range(5), lengths.get, 2) == [[0, 2], [3], [1, 4]]
    assert batches_of_equal_text([], lengths.get, 2) == []


def test_streams_split_into_rows_and_join_again():
    streams = TokenStreams(torch.randn(3, 6, 8), torch.randn(3, 5, 8))
    joined = TokenStreams.cat(streams.rows())
    assert torch.equal(joined.img, streams.img)
    assert torch.equal(joined.txt, streams.txt)
    rows = streams.rows()
    rows[0].img.zero_()
    assert streams.img.any(1).all()
    without = TokenStreams(torch.randn(2, 6, 8))
    assert TokenStreams.cat(without.rows()).txt is None


def test_residuals_join_along_the_batch():
    row = Residual(TokenStreams(torch.ones(1, 6, 8), torch.ones(1, 5, 8)), torch.ones(1, 6, 8))
    joined = Residual.cat([row, dataclasses.replace(row, back=row.back * 2)])
    assert joined.front.txt.shape == (2, 5, 8)
    assert joined.back[:, 0, 0].tolist() == [1.0, 2.0]
    assert Residual.from_tensors(joined.tensors()).tensors().keys() == {"front.img", "front.txt", "back"}
    assert Residual.from_tensors({}).tensors() == {}

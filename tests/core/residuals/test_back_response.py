"""The back span's linear response: exact where it must be, better than a constant where it can be."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.back_response import constant_part, fit_response
from blockskip_pack.blockskip_core.residuals.cache import ResidualCache
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.residuals.chunks import with_response
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes

from ..plain_dit import WIDTH, PlainDit, latents, lora_for, lora_tensors, reference_denoise, schedule, selection
from .test_sources import PLAN, quiet, residual_set, run

SPANS = selection(1, 2)


def pairs(matrix, offset, *, count=4, dtype=torch.float64, shift=0.0):
    generator = torch.Generator().manual_seed(3)
    entering = [torch.randn(1, 20, len(matrix), generator=generator, dtype=dtype) + shift for _ in range(count)]
    return [(h, h @ matrix + offset) for h in entering]


def matrix(width=5, dtype=torch.float64):
    return torch.randn(width, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_linear_span_is_found_exactly(shift):
    wanted, offset = matrix(), torch.arange(5.0, dtype=torch.float64)
    found = fit_response(pairs(wanted, offset, shift=shift), ridge=0.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_the_fit_is_ridge_regression_with_an_intercept():
    generator = torch.Generator().manual_seed(5)
    h, d = (torch.randn(60, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    centred = h - h.mean(0)
    penalty = 0.3 * (centred.square().mean(0)).mean() * len(h)
    rows = torch.cat([centred, penalty.sqrt() * torch.eye(5, dtype=h.dtype)])  # ridge as least squares with extra rows
    targets = torch.cat([d - d.mean(0), torch.zeros(5, 5, dtype=h.dtype)])
    wanted = torch.linalg.lstsq(rows, targets).solution
    found = fit_response([(h[:25], d[:25]), (h[25:], d[25:])], ridge=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_more_ridge_comes_closer_to_the_constant():
    sizes = [fit_response(pairs(matrix(), 0.0), ridge).norm().item() for ridge in (0.0, 0.1, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.02 * sizes[0]


def test_an_input_that_never_changes_gives_no_response():
    h = torch.ones(1, 20, 5, dtype=torch.float64)
    assert fit_response([(h, 3 * h)]).abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_constant_part_and_response_add_up_to_what_was_measured(dtype):
    (h, d), *_ = pairs(matrix().to(dtype), 1.0, dtype=dtype)
    response = fit_response([(h, d)])
    assert response.dtype == dtype
    again = constant_part(d, h, response) + h @ response
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(again, d, rtol=0, atol=tolerance)


def precomputed(dit, spans=SPANS, plan=None, clean=None):
    plan = plan or schedule()
    clean = latents() if clean is None else clean
    computed = precompute_residuals(dit, plan, clean, spans, range(len(plan)), keep_entering=True)
    response = fit_response((h, computed.residuals[draw].back) for draw, h in computed.entering.items())
    return with_response(computed, response), response


def denoised(dit, spans, computed, response, adapters):
    model = SkippingModel(dit, spans, False, folded=False)
    model.set_response(response)
    draws, plan = [0, 2], schedule()
    noisy, clean, sigmas = noisy_batch(plan, latents(), draws)
    with dit.running(model.modules) as denoise, adapters.attached(model.linears(), dit.weight_for_backward):
        model.replay(computed.residuals.__getitem__, draws, None)
        return denoise(noisy, sigmas, [plan[draw].caption for draw in draws]), (noisy, clean, sigmas)


@pytest.mark.parametrize("spans", [(0, 2), (1, 1), (1, 3), (2, 2)])
def test_with_nothing_learned_it_is_the_full_model(spans):
    dit, spans = PlainDit(), selection(*spans)
    computed, response = precomputed(dit, spans)
    ours, (noisy, _, sigmas) = denoised(dit, spans, computed, response, lora_for(dit, spans))
    full = reference_denoise(dit, noisy, sigmas, [0, 0])
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-12)


def test_output_and_gradients_are_those_of_the_written_out_formula():
    dit = PlainDit()
    computed, response = precomputed(dit)
    adapters = lora_for(dit, SPANS, zero=False)
    ours, (noisy, clean, sigmas) = denoised(dit, SPANS, computed, response, adapters)
    velocity_loss(ours, clean, sigmas).sum().backward()
    leaves = lora_tensors(adapters)
    wanted = reference_denoise(dit, noisy, sigmas, [0, 0], selection=SPANS, lora=leaves, response=response)
    velocity_loss(wanted, clean, sigmas).sum().backward()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    for name in adapters.names:
        down, up, _ = leaves[name]
        torch.testing.assert_close(adapters.down(name).grad, down.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(adapters.up(name).grad, up.grad, rtol=0, atol=1e-12)


def test_it_follows_the_full_model_more_closely_than_a_constant():
    """For forty draws of the small transformer, with a small LoRA."""
    dit = PlainDit()
    plan = schedule([0.1 + 0.8 * i / 40 for i in range(40)], [0] * 40)
    clean = latents(40)
    adapters = lora_for(dit, SPANS, zero=False, size=0.05)
    errors = {}
    linear, response = precomputed(dit, SPANS, plan, clean)
    constant = precompute_residuals(dit, plan, clean, SPANS, range(40))
    for name, computed, matrix in (("constant", constant, None), ("linear", linear, response)):
        ours, (noisy, _, sigmas) = denoised(dit, SPANS, computed, matrix, adapters)
        full = reference_denoise(dit, noisy, sigmas, [0, 0], lora=lora_tensors(adapters))
        errors[name] = (ours - full).norm().item()
    assert errors["linear"] < errors["constant"]


@pytest.mark.parametrize("storage", ["disk", "chunked"])
def test_disk_and_chunks_train_the_same(tmp_path, storage):
    settings = {"steps": 5, "learning_rate": 0.05}
    reference, a = run(residual_set(tmp_path / "one", chunk_size=2, back_residual="linear"), **settings)
    result, b = run(residual_set(tmp_path / "two", storage, chunk_size=2, back_residual="linear"), **settings)
    constant, _ = run(residual_set(tmp_path / "three"), **settings)
    assert result.losses == reference.losses
    assert result.losses[0] == pytest.approx(constant.losses[0], abs=1e-12)
    assert result.losses[1:] != constant.losses[1:]
    assert result.self_check < 1e-12
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_takes_one_matrix_more_on_disk(tmp_path):
    dit = PlainDit()
    constant, linear = (residual_set(tmp_path, back_residual=kind) for kind in ("constant", "linear"))
    assert constant.folder != linear.folder
    extra = residual_bytes(dit, linear, range(len(PLAN))) - residual_bytes(dit, constant, range(len(PLAN)))
    assert extra == WIDTH * WIDTH * 8
    write_cache(linear, dit, quiet)
    cache = ResidualCache(linear.folder, linear.identity)
    assert cache.draws_with("response") == [0]
    assert set(cache.residual(0).tensors()) == set(cache.residual(1).tensors())


def test_without_a_back_span_there_is_nothing_to_answer(tmp_path):
    linear = residual_set(tmp_path, spans=(2, 0), back_residual="linear")
    write_cache(linear, PlainDit(), quiet)
    assert ResidualCache(linear.folder, linear.identity).draws_with("response") == []
    assert run(linear, steps=3)[0].steps == 3


def test_on_the_fly_does_not_read_it(tmp_path):
    plain, linear = (run(residual_set(tmp_path, "on the fly", back_residual=kind), steps=3)[0]
                     for kind in ("constant", "linear"))  # fmt: skip
    assert plain.losses == linear.losses


def test_another_word_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="back_residual must be one of constant, linear, exact, got 'cubic'"):
        residual_set(tmp_path, back_residual="cubic")


def test_training_with_it_leaves_the_weights_as_they_were(tmp_path):
    dit = PlainDit()
    before = dit.weights_hash()
    run(residual_set(tmp_path, back_residual="linear"), dit=dit, steps=3)
    assert dit.weights_hash() == before

"""The back span's linear response: exact where it must be, better than a constant where it can be."""

import logging

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.linear_response import LinearResponse
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals import back_response
from blockskip_pack.blockskip_core.residuals.back_response import (
    HELD_OUT,
    MAX_BANDS,
    MAX_DRAWS,
    RANK,
    RIDGES,
    FittedResponse,
    constant_part,
    fit_response,
    how_fitted,
    noise_bands,
    response_bytes,
)
from blockskip_pack.blockskip_core.residuals.cache import ResidualCache
from blockskip_pack.blockskip_core.residuals.cached_set import write_cache
from blockskip_pack.blockskip_core.residuals.chunks import with_response
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes

from ..plain_dit import WIDTH, PlainDit, latents, lora_for, lora_tensors, reference_denoise, schedule, selection
from .test_low_rank_regression import normal, planted, tokens
from .test_sources import PLAN, quiet, residual_set, run

SPANS = selection(1, 2)
SIZE = 24  # width of planted maps
LEVELS = [(7 * index % 80 + 0.5) / 80 for index in range(80)]  # every level once, in no order


def spread(bands):
    """(h, d) of every draw of LEVELS, with another planted map in each quarter of the noise levels."""
    maps = [planted(2) + torch.diag(normal(SIZE, seed=20 + band)) for band in range(bands)]
    inputs = tokens(80 * 30, SIZE).unflatten(0, (80, 1, 30))
    return maps, [(h, h @ maps[int(level * bands)] + 3.0) for h, level in zip(inputs, LEVELS, strict=True)]


def asked_from(pairs):
    return lambda draws: (pairs[draw] for draw in draws)


def dense(response, band):
    return torch.diag(response.diagonal[band]) + response.down[band] @ response.up[band]


def test_every_band_gets_its_own_planted_map_exactly():
    maps, pairs = spread(MAX_BANDS)
    fitted = fit_response(LEVELS, asked_from(pairs), rank=2, ridges=(0.0,))
    torch.testing.assert_close(fitted.response.edges, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    for band, wanted in enumerate(maps):
        torch.testing.assert_close(dense(fitted.response, band), wanted, rtol=0, atol=1e-8)
    assert fitted.errors.shape == (MAX_BANDS,)
    assert fitted.problem() == ""


def test_a_band_answers_the_rows_of_its_noise_levels():
    maps, pairs = spread(MAX_BANDS)
    response = fit_response(LEVELS, asked_from(pairs), rank=2, ridges=(0.0,)).response
    h = torch.stack([tokens(5, SIZE)] * 4)
    found = response.added(h, response.bands([0.9, 0.25, 0.0, 1.0]))  # 0.25 is an edge: it belongs to the band below
    for row, band in enumerate((3, 0, 0, 3)):
        torch.testing.assert_close(found[row], h[row] @ maps[band], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("draws", "bands"), [(1, 1), (5, 1), (31, 1), (32, 2), (64, 4), (400, 4), (3000, 4)])
def test_bands_have_equally_many_draws_and_hold_some_out(draws, bands):
    sigmas = [(37 * draw % draws) / draws for draw in range(draws)]
    found = noise_bands(sigmas)
    assert len(found) == bands
    used = [draw for band in found for draw in (*band.fitted, *band.held_out)]
    assert len(set(used)) == len(used) == min(draws, MAX_DRAWS)
    sizes = [len(band.fitted) + len(band.held_out) for band in found]
    assert max(sizes) - min(sizes) <= 1
    assert all(
        len(band.held_out) == (size + HELD_OUT // 2) // HELD_OUT for band, size in zip(found, sizes, strict=True)
    )
    low = -1.0
    for band in found:
        assert all(low < sigmas[draw] <= band.top for draw in (*band.fitted, *band.held_out))
        low = band.top
    assert low == float("inf")


def test_more_than_a_chunk_of_a_usual_run_is_fitted():
    used = [draw for band in noise_bands([0.5] * 400) for draw in band.fitted]
    assert len(used) == 128
    assert max(used) > 390  # from the whole schedule


def test_for_flux_it_takes_three_mebibytes():
    assert response_bytes(400, 3072, 2) - 7 * 8 == 4 * (2 * RANK + 1) * 3072 * 2 == 3.0234375 * 2**20


def test_on_noise_there_is_no_answer(caplog):
    inputs = tokens(80 * 30, SIZE).unflatten(0, (80, 1, 30))
    noise = normal(80, 1, 30, SIZE, seed=30)
    fitted = fit_response(LEVELS, asked_from(list(zip(inputs, noise, strict=True))))
    assert fitted.response is None
    assert (fitted.errors > 1.0).all()
    assert "no better than a constant (error 1." in fitted.problem()


def test_a_band_of_noise_alone_has_no_answer():
    maps, pairs = spread(MAX_BANDS)
    noise = normal(80, 1, 30, SIZE, seed=30)
    mixed = [(h, noise[draw] if LEVELS[draw] > 0.75 else d) for draw, (h, d) in enumerate(pairs)]
    fitted = fit_response(LEVELS, asked_from(mixed), rank=2, ridges=(0.0,))
    assert (fitted.errors < 1.0).tolist() == [True, True, True, False]
    assert not dense(fitted.response, 3).any()
    torch.testing.assert_close(dense(fitted.response, 2), maps[2], rtol=0, atol=1e-8)
    assert "in 1 of 4 bands" in fitted.problem()


def test_the_error_is_that_of_draws_that_were_not_fitted():
    _, pairs = spread(1)
    noisy = [(h, d + 0.5 * normal(1, 30, SIZE, seed=100 + draw)) for draw, (h, d) in enumerate(pairs)]
    (band,) = noise_bands(LEVELS[:31])
    seen = []

    def asked(draws):
        for draw in draws:
            seen.append(draw)
            yield noisy[draw]

    fitted = fit_response(LEVELS[:31], asked, rank=2, ridges=(0.0,))
    assert seen == [*band.fitted, *band.held_out]
    fit_h, fit_d = (torch.cat([noisy[draw][part][0] for draw in band.fitted]) for part in (0, 1))
    h, d = (torch.cat([noisy[draw][part][0] for draw in band.held_out]) for part in (0, 1))
    left = (d - fit_d.mean(0)) - (h - fit_h.mean(0)) @ dense(fitted.response, 0)
    wanted = left.square().sum() / (d - fit_d.mean(0)).square().sum()
    assert fitted.errors.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_the_ridge_is_the_one_that_predicts_held_out_draws_best():
    _, pairs = spread(1)
    few = [(h[:, :2], d[:, :2] + 40.0 * normal(1, 2, SIZE, seed=100 + draw)) for draw, (h, d) in enumerate(pairs)]
    ridges = (0.001, 0.3, 30.0)
    alone = [fit_response(LEVELS[:31], asked_from(few), ridges=(ridge,)).errors.item() for ridge in ridges]
    assert alone[1] < min(alone[0], alone[2])
    assert fit_response(LEVELS[:31], asked_from(few), ridges=ridges).errors.item() == alone[1]


@pytest.mark.parametrize("draws", [1, 2])
def test_without_a_held_out_draw_there_is_no_answer(draws):
    _, pairs = spread(1)
    fitted = fit_response(LEVELS[:draws], asked_from(pairs))
    assert fitted.response is None
    assert "inf of a constant's" in fitted.problem()


def test_a_fit_is_read_as_it_was_stored():
    _, pairs = spread(MAX_BANDS)
    fitted = fit_response(LEVELS, asked_from(pairs))
    again = FittedResponse.found(fitted.tensors().get)
    assert torch.equal(again.errors, fitted.errors)
    for name, tensor in fitted.response.tensors().items():
        assert torch.equal(again.response.tensors()[name], tensor)
    nothing = FittedResponse(torch.tensor([1.5]), None)
    assert FittedResponse.found(nothing.tensors().get).response is None
    assert FittedResponse.found({"response": torch.eye(3)}.get) is None  # what versions before stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_constant_part_and_response_add_up_to_what_was_measured(dtype):
    _, pairs = spread(MAX_BANDS)
    pairs = [(h.to(dtype), d.to(dtype)) for h, d in pairs]
    response = fit_response(LEVELS, asked_from(pairs)).response
    assert response.diagonal.dtype == response.down.dtype == response.up.dtype == dtype
    h, d = pairs[3]
    again = constant_part(d, h, response, LEVELS[3]) + response.added(h, response.bands([LEVELS[3]]))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1.0}[dtype]
    torch.testing.assert_close(again, d, rtol=0, atol=tolerance)


def precomputed(dit, spans=SPANS, plan=None, clean=None, *, two_bands=True):
    plan = plan or schedule()
    clean = latents() if clean is None else clean
    computed = precompute_residuals(dit, plan, clean, spans, range(len(plan)), keep_entering=True)
    pairs = [(computed.entering[draw], computed.residuals[draw].back) for draw in range(len(plan))]
    response = fit_response([draw.sigma for draw in plan], asked_from(pairs)).response
    assert response is not None
    if two_bands:  # another map for high noise than for low, so that a row with the wrong one shows
        maps = (torch.cat([x[:1], 2 * x[:1]]) for x in (response.diagonal, response.down, response.up))
        response = LinearResponse(torch.tensor([0.4], dtype=torch.float64), *maps)
    return with_response(computed, plan, response), response


def denoised(dit, spans, computed, response, adapters):
    model = SkippingModel(dit, spans, False, folded=False)
    draws, plan = [0, 2], schedule()
    model.set_response(response, lambda draw: plan[draw].sigma)
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


@pytest.mark.parametrize("spans", [SPANS, selection(0, 2, tail=1), selection(1, 1, tail=2)], ids=str)
def test_output_and_gradients_are_those_of_the_written_out_formula(spans):
    dit = PlainDit()
    computed, response = precomputed(dit, spans)
    adapters = lora_for(dit, spans, zero=False)
    ours, (noisy, clean, sigmas) = denoised(dit, spans, computed, response, adapters)
    velocity_loss(ours, clean, sigmas).sum().backward()
    leaves = lora_tensors(adapters)
    bands = response.bands([schedule()[draw].sigma for draw in (0, 2)])
    assert bands.tolist() == [0, 1]
    written_out = torch.stack([dense(response, band) for band in bands])
    wanted = reference_denoise(
        dit, noisy, sigmas, [0, 0], selection=spans, lora=leaves, response=lambda moved: moved @ written_out
    )
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
    linear, response = precomputed(dit, SPANS, plan, clean, two_bands=False)
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


def test_it_takes_its_maps_more_on_disk(tmp_path):
    dit = PlainDit()
    constant, linear = (residual_set(tmp_path, back_residual=kind) for kind in ("constant", "linear"))
    assert constant.folder != linear.folder
    extra = residual_bytes(dit, linear, range(len(PLAN))) - residual_bytes(dit, constant, range(len(PLAN)))
    assert extra == response_bytes(len(PLAN), WIDTH, 8)
    write_cache(linear, dit, quiet)
    cache = ResidualCache(linear.folder, linear.identity)
    names = [f"response.{name}" for name in ("held_out", "edges", "diagonal", "down", "up")]
    assert sum(cache.first(name)[1].nbytes for name in names) == extra
    assert all(cache.draws_with(name) == [0] for name in names)
    assert set(cache.residual(0).tensors()) == set(cache.residual(1).tensors())


def test_without_a_back_span_there_is_nothing_to_answer(tmp_path):
    linear = residual_set(tmp_path, spans=(2, 0), back_residual="linear")
    write_cache(linear, PlainDit(), quiet)
    assert ResidualCache(linear.folder, linear.identity).draws_with("response.held_out") == []
    assert run(linear, steps=3)[0].steps == 3


@pytest.mark.parametrize("storage", ["disk", "chunked"])
def test_a_fit_that_does_not_help_is_a_constant_and_is_told(tmp_path, storage, monkeypatch, caplog):
    monkeypatch.setattr(back_response, "held_out_error", lambda *_: 1.25)
    with caplog.at_level(logging.WARNING):
        result, a = run(residual_set(tmp_path / "one", storage, back_residual="linear"), steps=4)
    constant, b = run(residual_set(tmp_path / "two", storage), steps=4)
    assert result.losses == constant.losses
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    (problem,) = result.problems
    assert "no better than a constant (error 1.25 of a constant's)" in problem
    assert [record.message for record in caplog.records] == [f"BlockSkip: {problem}"]


def test_a_fit_that_helps_is_logged_once_and_is_no_problem(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        result, _ = run(residual_set(tmp_path, "chunked", chunk_size=2, back_residual="linear"), steps=4)
    assert result.problems == []
    (line,) = [record.message for record in caplog.records if "linear back residual" in record.message]
    assert "in 1 band of noise levels: error on held-out training examples 0." in line


def test_an_interrupted_cache_resumes_with_the_maps_that_it_has(tmp_path, monkeypatch):
    whole = residual_set(tmp_path / "whole", back_residual="linear")
    write_cache(whole, PlainDit(), quiet)
    part, calls = residual_set(tmp_path / "part", back_residual="linear"), []

    def stop(phase, done, total):
        calls.append(phase)
        if phase == "computing residuals" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(part, PlainDit(), stop)
    assert "fitting the linear back residual" in calls
    again = []
    write_cache(part, PlainDit(), lambda phase, done, total: again.append(phase))
    assert set(again) == {"computing residuals"}
    for draw in range(len(PLAN)):
        stored = [ResidualCache(each.folder, each.identity).read(draw) for each in (whole, part)]
        assert stored[0].keys() == stored[1].keys()
        assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_progress_of_the_fit_rises_to_its_total(tmp_path):
    seen = []
    write_cache(
        residual_set(tmp_path, back_residual="linear", chunk_size=2), PlainDit(), lambda *report: seen.append(report)
    )
    fitting = [(done, total) for phase, done, total in seen if phase == "fitting the linear back residual"]
    assert [done for done, _ in fitting] == sorted(done for done, _ in fitting)
    assert fitting[-1][0] == fitting[-1][1]
    assert fitting.count(fitting[-1]) == 1 + len(RIDGES), "again before every regression, so that it can be cancelled"


def test_how_it_is_fitted_does_not_depend_on_the_chunk_and_is_named():
    assert how_fitted(400) == "linear, 4 bands, rank 64, ridge (0.01, 0.1, 1.0), 160 draws, one in 5 held out"
    assert how_fitted(10) != how_fitted(11)


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

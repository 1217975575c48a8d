"""The training loop on a plain model in float64, compared with independent autograd."""

import math
from contextlib import nullcontext

import pytest
import torch
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import TrainingError
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity

from ..plain_dit import (
    MemorySource,
    PlainDit,
    latents,
    lora_for,
    lora_tensors,
    needed,
    reference_denoise,
    schedule,
    selection,
    train,
)

NUM_BLOCKS = 5
SPANS = [(n, m) for n in range(NUM_BLOCKS) for m in range(NUM_BLOCKS - n)]
SPANS_BEFORE_A_TAIL = [(n, m, k) for n in range(3) for m in range(1, 4) for k in range(1, 4) if n + m + k < NUM_BLOCKS]
EXACT = {"atol": 1e-10, "rtol": 0.0}  # float64 rounding with another order of operations


def reference_gradients(dit, chosen, adapters, plan, clean, draws):
    """Loss and LoRA gradients of the mean over draws, by plain autograd."""
    lora = lora_tensors(adapters)
    noisy, target, sigmas = noisy_batch(plan, clean, draws)
    captions = [plan[draw].caption for draw in draws]
    loss = 0.0
    for row in range(len(draws)):  # one row at a time, because texts may differ in length
        one = slice(row, row + 1)
        denoised = reference_denoise(dit, noisy[one], sigmas[one], captions[one], selection=chosen, lora=lora)
        noise = plan[draws[row]].noise(clean.shape[1:], clean.dtype)
        velocity = (noisy[one] - denoised) / sigmas[row]
        loss = loss + (velocity - (noise - target[one])).square().mean() / len(draws)
    leaves = {f"{name}.{part}": pair[i] for name, pair in lora.items() for i, part in enumerate("AB")}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.item(), {
        key: torch.zeros_like(leaf) if grad is None else grad
        for (key, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def assert_same_gradients(got, expected, **tolerance):
    for key, gradient in expected.items():
        actual = got.get(key, torch.zeros_like(gradient))  # the text stream of a last double block gets none
        torch.testing.assert_close(actual, gradient, **(tolerance or EXACT), msg=lambda text, key=key: f"{key}: {text}")


def trained(front, back, tail=0, *, zero=False, dit=None, plan=None, clean=None, source=None, **settings):
    """Train one run and return (dit, selection, adapters before the run, result, gradients)."""
    dit, plan, chosen = dit or PlainDit(), plan or schedule(), selection(front, back, tail=tail)
    clean = latents(len(plan)) if clean is None else clean
    source = source or MemorySource(dit, chosen, plan, clean, needed(len(plan), **settings))
    result, gradients = train(dit, chosen, source, lora_for(dit, chosen, zero=zero), plan=plan, clean=clean, **settings)
    return dit, chosen, lora_for(dit, chosen, zero=zero), result, gradients


def each_with_one_of(names, spans, **options):
    """Every span once, with the values of each option in turn."""
    rows = [(*span, *(values[place % len(values)] for values in options.values())) for place, span in enumerate(spans)]
    return pytest.mark.parametrize((*names, *options), rows)


# --- gradients and losses ----------------------------------------------------------------------------------------


@each_with_one_of(("front", "back"), SPANS, checkpointing=(False, True))
def test_loss_and_gradients_are_those_of_plain_autograd(front, back, checkpointing):
    plan, clean = schedule(), latents()
    dit, chosen, adapters, result, got = trained(
        front, back, plan=plan, clean=clean, batch_size=2, checkpointing=checkpointing
    )
    loss, expected = reference_gradients(dit, chosen, adapters, plan, clean, [0, 1])
    assert result.losses == [pytest.approx(loss, abs=1e-12)]
    assert_same_gradients(got, expected)
    assert any(gradient.any() for gradient in got.values())


@each_with_one_of(("front", "back"), SPANS, checkpointing=(False, True), source=(None, None, FoldedSource()))
def test_with_an_exact_back_loss_and_gradients_are_those_of_the_whole_model(front, back, checkpointing, source):
    """With any LoRA: the whole model by plain autograd, nothing skipped, with the LoRA on the middle blocks."""
    plan, clean, dit = schedule(), latents(), PlainDit()
    chosen = selection(front, back).with_exact_back()
    adapters = lora_for(dit, chosen, zero=False)
    assert {name.rpartition(".")[0] for name in adapters.names} == {dit.blocks[i].name for i in chosen.adapted}
    source = source or MemorySource(dit, chosen, plan, clean)
    loss, expected = reference_gradients(dit, None, adapters, plan, clean, [0, 1])
    result, got = train(
        dit, chosen, source, adapters, plan=plan, clean=clean, batch_size=2, checkpointing=checkpointing
    )
    assert result.losses == [pytest.approx(loss, abs=1e-12)]
    assert_same_gradients(got, expected)


def test_an_exact_back_is_what_the_papers_constant_is_not():
    """The test above can fail: with a constant the gradients differ as soon as blocks at the end are skipped."""
    plan, clean, dit = schedule(), latents(), PlainDit()
    adapters = lora_for(dit, selection(1, 2), zero=False)
    _, expected = reference_gradients(dit, None, adapters, plan, clean, [0, 1])
    _, _, _, _, got = trained(1, 2, dit=dit, plan=plan, clean=clean, batch_size=2)
    with pytest.raises(AssertionError):
        assert_same_gradients(got, expected)


@each_with_one_of(("front", "back", "tail"), SPANS_BEFORE_A_TAIL, checkpointing=(False, True))
def test_with_a_tail_loss_and_gradients_are_those_of_plain_autograd(front, back, tail, checkpointing):
    """Image and text residuals of the span are constants, and the gradient passes them as if they were not there."""
    plan, clean = schedule(), latents()
    dit, chosen, adapters, result, got = trained(
        front, back, tail, plan=plan, clean=clean, batch_size=2, checkpointing=checkpointing
    )
    assert {name.rpartition(".")[0] for name in adapters.names} == {dit.blocks[i].name for i in chosen.adapted}
    loss, expected = reference_gradients(dit, chosen, adapters, plan, clean, [0, 1])
    assert result.losses == [pytest.approx(loss, abs=1e-12)]
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(("front", "back", "tail"), SPANS_BEFORE_A_TAIL)
def test_with_nothing_learned_the_tails_own_gradient_is_that_of_the_whole_model(front, back, tail):
    """With B = 0 the tail sees the whole model's tokens, and nothing skipped lies between it and the loss."""
    plan, clean = schedule(), latents()
    dit, chosen, adapters, _, got = trained(front, back, tail, zero=True, plan=plan, clean=clean, batch_size=2)
    _, expected = reference_gradients(dit, None, adapters, plan, clean, [0, 1])
    last = tuple(dit.blocks[index].name + "." for index in chosen.tail_span)
    own = {key: gradient for key, gradient in expected.items() if key.startswith(last)}
    assert any(gradient.any() for gradient in own.values())
    assert_same_gradients(got, own)


@each_with_one_of(("front", "back", "tail"), SPANS_BEFORE_A_TAIL, source=(None, FoldedSource()))
def test_an_exact_back_before_a_tail_gives_the_gradients_of_the_whole_model(front, back, tail, source):
    plan, clean, dit = schedule(), latents(), PlainDit()
    chosen = selection(front, back, tail=tail).with_exact_back()
    adapters = lora_for(dit, chosen, zero=False)
    loss, expected = reference_gradients(dit, None, adapters, plan, clean, [0, 1])
    source = source or MemorySource(dit, chosen, plan, clean)
    result, got = train(dit, chosen, source, adapters, plan=plan, clean=clean, batch_size=2)
    assert result.losses == [pytest.approx(loss, abs=1e-12)]
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(("front", "back", "tail"), SPANS_BEFORE_A_TAIL)
def test_with_a_tail_the_folded_form_is_the_cached_form_while_nothing_is_learned(front, back, tail):
    _, _, _, cached, expected = trained(front, back, tail, zero=True, batch_size=2)
    _, _, _, folded, got = trained(front, back, tail, zero=True, batch_size=2, source=FoldedSource())
    assert folded.losses == [pytest.approx(cached.losses[0], abs=1e-12)]
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(("front", "back"), SPANS)
def test_the_folded_form_is_the_cached_form_while_nothing_is_learned(front, back):
    _, _, _, cached, expected = trained(front, back, zero=True, batch_size=2)
    _, _, _, folded, got = trained(front, back, zero=True, batch_size=2, source=FoldedSource())
    assert folded.losses == [pytest.approx(cached.losses[0], abs=1e-12)]
    assert folded.self_check is None
    assert_same_gradients(got, expected)


def test_the_folded_back_residual_follows_the_lora_and_the_cached_one_does_not():
    """Without a back span the two are equal with any LoRA; with one, the folded loss is the full model's."""
    _, _, _, cached, expected = trained(2, 0, batch_size=2)
    _, _, _, folded, got = trained(2, 0, batch_size=2, source=FoldedSource())
    assert folded.losses == [pytest.approx(cached.losses[0], abs=1e-12)]
    assert_same_gradients(got, expected)

    plan, clean = schedule(), latents()
    dit, _, adapters, folded, _ = trained(1, 2, plan=plan, clean=clean, batch_size=2, source=FoldedSource())
    full, _ = reference_gradients(dit, None, adapters, plan, clean, [0, 1])
    assert folded.losses == [pytest.approx(full, abs=1e-12)]
    assert trained(1, 2, batch_size=2)[3].losses[0] != pytest.approx(full, abs=1e-6)


def test_with_nothing_learned_the_loss_is_the_full_models():
    plan, clean, dit = schedule(), latents(), PlainDit()
    noisy, target, sigmas = noisy_batch(plan, clean, [0])
    loss = velocity_loss(dit.denoise(noisy, sigmas, [0]), target, sigmas).item()
    for front, back in SPANS:
        assert trained(front, back, zero=True, plan=plan, clean=clean)[3].losses == [pytest.approx(loss, abs=1e-12)]


def test_a_batch_is_the_mean_of_its_rows_whatever_their_noise_levels_and_text_lengths():
    plan, clean = schedule((0.3, 0.9, 0.55, 0.7), (0, 2, 1, 2)), latents()
    dit, chosen, adapters, result, got = trained(1, 2, plan=plan, clean=clean, batch_size=4)
    loss, expected = reference_gradients(dit, chosen, adapters, plan, clean, [0, 1, 2, 3])
    assert result.losses == [pytest.approx(loss, abs=1e-12)]
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("source", [None, FoldedSource()], ids=["cached", "folded"])
def test_accumulating_micro_batches_gives_the_gradients_of_one_batch(source):
    together = trained(1, 2, batch_size=4, source=source)
    apart = trained(1, 2, batch_size=1, accumulation=4, source=source)
    assert_same_gradients(apart[4], together[4])
    assert len(apart[3].losses) == 4
    assert sum(apart[3].losses) / 4 == pytest.approx(together[3].losses[0], abs=1e-12)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_a_loss_weighting_is_that_of_the_sd3_paper(weighting):
    plan, clean = schedule(), latents()
    dit, chosen, adapters, result, _ = trained(1, 2, plan=plan, clean=clean, batch_size=2, loss_weighting=weighting)
    factors = {
        "sigma_sqrt": lambda s: s**-2,
        "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s)),
    }[weighting]
    expected = sum(
        factors(plan[d].sigma) * reference_gradients(dit, chosen, adapters, plan, clean, [d])[0] / 2 for d in (0, 1)
    )
    assert result.losses == [pytest.approx(expected, rel=1e-6)]  # diffusers rounds the factors to float32


def test_no_gradient_lands_on_the_model():
    dit = trained(1, 2)[0]
    assert all(parameter.grad is None for parameter in dit.net.parameters())


def test_only_kept_blocks_have_a_lora():
    dit, chosen = PlainDit(), selection(1, 2)
    blocks = {".".join(name.split(".")[:2]) for name in lora_for(dit, chosen).names}
    assert blocks == {"double_blocks.1", "single_blocks.0"}


# --- the optimiser and its schedule ------------------------------------------------------------------------------


def test_a_step_is_adamws_on_clipped_gradients():
    dit, chosen, before, _, gradients = trained(1, 2, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.05)
    leaves = [parameter.detach().clone() for parameter in before.parameters()]
    keys = [f"{name}.{part}" for name in before.names for part in "AB"]
    for leaf, key in zip(leaves, keys, strict=True):
        leaf.grad = gradients.get(key)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert norm > 0.05
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad = leaf.grad * (0.05 / (norm + 1e-6))
    torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.1).step()

    adapters = lora_for(dit, chosen, zero=False)
    reports = []
    train(
        dit, chosen, MemorySource(dit, chosen, schedule(), latents()), adapters, on_step=reports.append,
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.05,
    )  # fmt: skip
    for parameter, expected in zip(adapters.parameters(), leaves, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-12, rtol=0.0)
    assert reports[0].grad_norm == pytest.approx(norm, rel=1e-12)


def test_the_loss_falls_and_reports_tell_it():
    reports = []
    *_, result, _ = trained(
        1, 2, zero=True, steps=30, batch_size=4, accumulation=2, learning_rate=3e-2, on_step=reports.append
    )
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert [report.step for report in reports] == list(range(1, 31))
    assert [loss for report in reports for loss in report.losses] == result.losses
    assert reports[3].loss == pytest.approx(sum(result.losses[6:8]) / 2)
    assert (result.steps, len(result.step_seconds), len(result.losses)) == (30, 30, 60)
    assert result.saved_bytes > 0


def test_the_same_settings_give_the_same_run():
    first, second = (trained(1, 2, zero=True, steps=4)[3].losses for _ in range(2))
    assert first == second


def test_checkpointing_keeps_less_and_gives_the_same_run():
    plain = trained(0, 2, zero=True, steps=4, checkpointing=False)[3]
    checkpointed = trained(0, 2, zero=True, steps=4, checkpointing=True)[3]
    assert checkpointed.losses == plain.losses
    assert checkpointed.saved_bytes < plain.saved_bytes / 2


def test_the_learning_rate_follows_its_schedule():
    rates = []
    trained(
        1, 2, steps=4, learning_rate=1e-2, lr_schedule="linear", warmup_steps=2,
        on_step=lambda report: rates.append(report.learning_rate),
    )  # fmt: skip
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_a_run_longer_than_the_schedule_starts_over():
    *_, result, _ = trained(1, 2, zero=True, steps=8, learning_rate=1e-12)
    assert result.losses[:4] == pytest.approx(result.losses[4:], rel=1e-6)
    assert len(set(result.losses[:4])) == 4


# --- the model stays as it was -----------------------------------------------------------------------------------


class Interrupt(BaseException):
    """The exception with which a host interrupts a run."""


@pytest.mark.parametrize("source", [None, FoldedSource()], ids=["cached", "folded"])
@pytest.mark.parametrize("problem", [None, RuntimeError, Interrupt], ids=["end", "exception", "interrupt"])
def test_the_model_is_left_as_it_was(problem, source):
    dit = PlainDit()
    before, modules = dit.weights_hash(), dit.modules_by_name()
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in modules.items()}

    def on_step(report):
        assert dit.modules_by_name()["double_blocks.1"] is not modules["double_blocks.1"]
        if problem and report.step == 2:
            raise problem

    with pytest.raises(problem) if problem else nullcontext():
        trained(1, 2, zero=True, dit=dit, source=source, steps=4, on_step=on_step)
    assert dit.weights_hash() == before
    now = dit.modules_by_name()
    assert now.keys() == modules.keys()
    for name, module in modules.items():
        assert now[name] is module
        assert len(module._forward_hooks) + len(module._forward_pre_hooks) == hooks[name]
        assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_an_interrupted_run_keeps_what_it_has_learned():
    def on_step(report):
        if report.step == 3:
            raise Interrupt

    dit, chosen, plan, clean = PlainDit(), selection(1, 2), schedule(), latents()
    source = MemorySource(dit, chosen, plan, clean)
    interrupted, whole = lora_for(dit, chosen), lora_for(dit, chosen)
    with pytest.raises(Interrupt):
        train(dit, chosen, source, interrupted, on_step=on_step, steps=10)
    train(dit, chosen, source, whole, steps=3)
    for a, b in zip(interrupted.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_host_that_runs_without_gradients_can_train(mode):
    expected = trained(1, 2, batch_size=2)[4]
    dit, plan, chosen, clean = PlainDit(), schedule(), selection(1, 2), latents()
    source, adapters = MemorySource(dit, chosen, plan, clean), lora_for(dit, chosen, zero=False)
    with mode():
        _, got = train(dit, chosen, source, adapters, plan=plan, clean=clean, batch_size=2)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("source", [None, FoldedSource()], ids=["cached", "folded"])
def test_weights_that_are_inference_tensors_can_be_trained_over(source):
    with torch.inference_mode():
        dit = PlainDit()
        dit.net.to(torch.float32).to(torch.float64)
    assert all(p.is_inference() for p in dit.net.parameters())
    ordinary = PlainDit()
    ordinary.net.to(torch.float32).to(torch.float64)
    got = trained(1, 2, dit=dit, batch_size=2, source=source)[4]
    assert_same_gradients(got, trained(1, 2, dit=ordinary, batch_size=2, source=source)[4])


# --- runs that must stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_applied(accumulation):
    plan, chosen = schedule(), selection(1, 2)
    dit, clean = PlainDit(), latents()
    source = MemorySource(dit, chosen, plan, clean)
    bad = clean.clone()
    bad[3] = float("nan")  # reached in micro-batch 3
    adapters, expected = lora_for(dit, chosen), lora_for(dit, chosen)
    done = 3 // accumulation
    with pytest.raises(TrainingError, match=rf"loss is not finite in step {done + 1}\..*as it was after step {done}\."):
        train(dit, chosen, source, adapters, clean=bad, steps=4, accumulation=accumulation)
    train(dit, chosen, source, expected, clean=clean, steps=done, accumulation=accumulation)
    for a, b in zip(adapters.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def half_precision_run(overflow_at, *, steps, **more):
    """Train a model in float16 whose gradients overflow in some steps, as with large activations."""
    dit, chosen = PlainDit(dtype=torch.float16), selection(1, 2)
    clean = latents(dtype=torch.float16)
    adapters = lora_for(dit, chosen, dtype=torch.float32)
    seen, after = [], []

    def overflow(grad):
        seen.append(None)
        return grad * (float("inf") if len(seen) in overflow_at else 1.0)

    adapters.up(adapters.names[0]).register_hook(overflow)
    source = MemorySource(dit, chosen, schedule(), clean)
    result, _ = train(
        dit, chosen, source, adapters, clean=clean, steps=steps,
        on_step=lambda report: after.append([p.detach().clone() for p in adapters.parameters()]), **more,
    )  # fmt: skip
    return result, after


def test_a_step_whose_gradient_overflows_in_float16_is_left_out():
    result, after = half_precision_run({2}, steps=4)
    assert (result.steps, result.overflows) == (4, 1)
    same = [all(map(torch.equal, a, b)) for a, b in zip(after, after[1:], strict=False)]
    assert same == [True, False, False], "only the second step changes nothing"


def test_overflow_after_overflow_ends_the_run():
    with pytest.raises(TrainingError, match="gradient is not finite in step 22"):
        half_precision_run(range(3, 100), steps=40)


def test_the_scale_of_a_loss_in_float16_is_part_of_a_checkpoint(tmp_path):
    def states(name):
        return Checkpoints(tmp_path / name, RunIdentity({"run": "this"}), every=1, keep=9)

    whole = half_precision_run({2, 3}, steps=6, checkpoints=states("whole"))[1]
    half_precision_run({2, 3}, steps=3, checkpoints=states("parts"))
    resumed = half_precision_run(set(), steps=6, checkpoints=states("parts"))[1]
    assert all(map(torch.equal, whole[-1], resumed[-1]))
    assert states("parts").newest(9).numbers["loss scale/scale"] == 256.0


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied():
    dit, chosen = PlainDit(), selection(1, 2)
    adapters = lora_for(dit, chosen)
    before = [p.detach().clone() for p in adapters.parameters()]
    adapters.up(adapters.names[0]).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"gradient is not finite in step 1\..*after step 0"):
        train(dit, chosen, MemorySource(dit, chosen, schedule(), latents()), adapters)
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), before, strict=True))


# --- waiting for the device --------------------------------------------------------------------------------------


def test_each_loss_is_read_once(monkeypatch):
    """Each time a number is read, the CPU waits for the GPU. The optimiser also reads numbers."""
    readings, read = [], torch.Tensor.item
    dit, plan, clean, chosen = PlainDit(), schedule(), latents(), selection(1, 2)
    source, adapters = MemorySource(dit, chosen, plan, clean), lora_for(dit, chosen)
    steps = []
    monkeypatch.setattr(
        torch.Tensor, "item", lambda tensor: readings.extend([1] * tensor.requires_grad) or read(tensor)
    )
    train(
        dit, chosen, source, adapters, plan=plan, clean=clean, steps=3, accumulation=2,
        on_step=lambda report: steps.append(len(readings)),
    )  # fmt: skip
    assert [b - a for a, b in zip(steps, steps[1:], strict=False)] == [2, 2]


# --- half precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_half_precision_are_neither_scaled_nor_lost(dtype):
    """float16 cannot represent gradients this small, so the loss is scaled up and the gradients scaled back."""
    dit, plan = PlainDit(dtype=dtype), schedule()
    wide = PlainDit(dtype=torch.float64)
    wide.net.load_state_dict({name: x.double() for name, x in dit.net.state_dict().items()})
    wide.captions = [text.double() for text in dit.captions]
    chosen, clean = selection(1, 1), latents()
    settings = {"plan": plan, "max_grad_norm": 0.0}
    norms = {}
    for name, model in (("narrow", dit), ("wide", wide)):
        reports = []
        source = MemorySource(model, chosen, plan, clean.to(model.dtype))
        adapters = lora_for(model, chosen, zero=False, dtype=torch.float32)
        train(model, chosen, source, adapters, clean=clean.to(model.dtype), on_step=reports.append, **settings)
        norms[name] = reports[0].grad_norm
    assert norms["narrow"] == pytest.approx(norms["wide"], rel=0.05)

"""Offsets undo what quantisation changes: predictions of the model as loaded, gradients of the quantised one."""

import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch, velocity_loss
from blockskip_pack.blockskip_core.errors import TrainingError
from blockskip_pack.blockskip_core.residuals.source import OpenResiduals
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource, source_of
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity
from blockskip_pack.blockskip_core.training.quantisation_offsets import QuantisationOffsets

from ..plain_dit import (
    MemorySource,
    PlainDit,
    latents,
    lora_for,
    lora_tensors,
    reference_denoise,
    schedule,
    selection,
    train,
)
from ..residuals.test_sources import quiet, residual_set

EXACT = {"atol": 1e-10, "rtol": 0.0}  # float64 rounding with another order of operations
PLACES = [(0, 0), (2, 0), (0, 2), (1, 2)]


class Rounded(PlainDit):
    """The plain model with coarse weights in its blocks, as if it was quantised."""

    known_error = 10.0  # what the self-check allows

    def __init__(self, step=0.1):
        super().__init__()
        with torch.no_grad():
            for block in (*self.net.double_blocks, *self.net.single_blocks):
                for parameter in block.parameters():
                    parameter.copy_((parameter / step).round() * step)


def losses_of(dit, spans, source=None, offsets=None, zero=True, **settings):
    """Losses, gradients and the LoRA of a run whose residuals are those of the exact model."""
    chosen = selection(*spans)
    source = source or MemorySource(PlainDit(), chosen, schedule(), latents())
    adapters = lora_for(dit, chosen, zero=zero)
    result, gradients = train(dit, chosen, source, adapters, offsets=offsets, **settings)
    return result.losses, gradients, adapters.state_dict()


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, **(tolerance or EXACT), msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("spans", PLACES)
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("folded", [False, True])
def test_a_lora_of_zero_has_the_loss_of_the_exact_model(spans, batch_size, folded):
    settings = {"batch_size": batch_size, "learning_rate": 1e-30, "steps": 6}
    source = FoldedSource() if folded else None
    exact, *_ = losses_of(PlainDit(), spans, source, **settings)
    corrected, *_ = losses_of(Rounded(), spans, source, QuantisationOffsets(PlainDit()), **settings)
    rounded, *_ = losses_of(Rounded(), spans, source, **settings)
    torch.testing.assert_close(torch.tensor(corrected), torch.tensor(exact), atol=1e-12, rtol=0)
    assert all(abs(a - b) > 1e-5 for a, b in zip(rounded, exact, strict=True))


def test_gradients_are_those_of_the_quantised_model_at_the_corrected_prediction():
    dit, exact, chosen, plan, clean = Rounded(), PlainDit(), selection(0, 0), schedule(), latents()
    adapters = lora_for(dit, chosen, zero=False)
    lora = lora_tensors(adapters)
    noisy, target, sigmas = noisy_batch(plan, clean, [0])
    args = (noisy, sigmas, [plan[0].caption])
    with torch.no_grad():
        offset = reference_denoise(exact, *args) - reference_denoise(dit, *args)
    loss = velocity_loss(reference_denoise(dit, *args, lora=lora) + offset, target, sigmas).sum()
    leaves = {f"{name}.{part}": pair[i] for name, pair in lora.items() for i, part in enumerate("AB")}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    expected = {key: grad for key, grad in zip(leaves, found, strict=True) if grad is not None}
    losses, gradients, _ = losses_of(dit, (0, 0), offsets=QuantisationOffsets(exact), zero=False)
    assert losses[0] == pytest.approx(loss.item(), abs=1e-12)
    assert_same({key: gradients[key] for key in expected}, expected)


@pytest.mark.parametrize("spans", PLACES)
def test_without_quantisation_nothing_changes(spans):
    _, _, plain = losses_of(PlainDit(), spans, steps=5, batch_size=2)
    _, _, corrected = losses_of(PlainDit(), spans, offsets=QuantisationOffsets(PlainDit()), steps=5, batch_size=2)
    assert_same(corrected, plain)


def test_a_lora_learns_the_examples_and_not_the_error():
    """Judged by the loss of the exact model, beside a LoRA that was trained there."""
    source = MemorySource(PlainDit(), selection(1, 0), schedule(), latents())

    def loss_on_the_exact_model(lora):
        adapters = lora_for(PlainDit(), selection(1, 0))
        adapters.load_state_dict(lora)
        result, _ = train(PlainDit(), selection(1, 0), source, adapters, steps=1, batch_size=4, learning_rate=1e-30)
        return result.losses[0]

    settings = {"steps": 100, "batch_size": 4, "learning_rate": 3e-3}
    untrained = loss_on_the_exact_model(lora_for(PlainDit(), selection(1, 0)).state_dict())
    exact, plain, corrected = (
        loss_on_the_exact_model(losses_of(dit, (1, 0), source, offsets, **settings)[2])
        for dit, offsets in (
            (PlainDit(), None), (Rounded(0.06), None), (Rounded(0.06), QuantisationOffsets(PlainDit())),
        )
    )  # fmt: skip
    lost = [(loss - exact) / (untrained - exact) for loss in (plain, corrected)]
    assert 0 < lost[1] < 0.7 * lost[0], lost


class TwoStretches:
    """The draws of a run in stretches of two micro-batches; residuals of other draws do not exist."""

    def __init__(self, chosen):
        self.source = lambda draws: MemorySource(PlainDit(), chosen, schedule(), latents(), draws)

    def stretches(self, run, start=0):
        for first in range(start, len(run), 2):
            numbers = range(first, min(first + 2, len(run)))
            draws = [draw for number in numbers for draw in run.draws_of(number, 4)]
            computed = self.source(draws).computed
            yield nullcontext(OpenResiduals(numbers, computed.residuals.__getitem__, computed.reference))


class Recorder:
    def __init__(self):
        self.seen, self.inside, self.entered = [], False, 0

    def __call__(self, what, done, total):
        self.seen.append((what, done, total, self.inside))

    @contextmanager
    def apart(self):
        self.inside, self.entered = True, self.entered + 1
        try:
            yield
        finally:
            self.inside = False


def test_a_stretch_computes_its_own_draws_and_the_same_comes_out():
    chosen, seen = selection(1, 1), Recorder()
    offsets = QuantisationOffsets(PlainDit(), seen, seen.apart)
    _, _, stretched = losses_of(Rounded(), (1, 1), TwoStretches(chosen), offsets, steps=6)
    _, _, at_once = losses_of(Rounded(), (1, 1), offsets=QuantisationOffsets(PlainDit()), steps=6)
    assert_same(stretched, at_once)
    assert seen.entered == 3
    loaded, quantised = "examples predicted as loaded", "examples predicted quantised"
    assert seen.seen == [
        (what, done, 2, what == loaded) for _ in range(3) for what in (loaded, quantised) for done in (1, 2)
    ]


def test_every_draw_is_computed_once_and_only_those_that_are_used():
    seen = Recorder()
    offsets = QuantisationOffsets(PlainDit(), seen, seen.apart)
    losses_of(Rounded(), (1, 1), offsets=offsets, steps=9, batch_size=1)
    assert [entry[:3] for entry in seen.seen if entry[1] == entry[2]] == [
        ("examples predicted as loaded", 4, 4),
        ("examples predicted quantised", 4, 4),
    ]
    assert seen.entered == 1
    few = Recorder()
    losses_of(Rounded(), (1, 1), offsets=QuantisationOffsets(PlainDit(), few), steps=2)
    assert {entry[2] for entry in few.seen} == {2}


def test_a_second_try_does_not_run_the_loaded_model_again():
    seen, source = Recorder(), MemorySource(PlainDit(), selection(1, 1), schedule(), latents())
    offsets = QuantisationOffsets(PlainDit(), seen, seen.apart)
    for _ in range(2):
        losses_of(Rounded(), (1, 1), source, offsets, steps=4)
    assert seen.entered == 1


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
def test_it_is_the_same_with_every_storage_and_a_residual_is_read_ahead_in_order(tmp_path, storage):
    made = residual_set(tmp_path, storage, spans=(1, 2), chunk_size=2)
    dit, exact = Rounded(), PlainDit()
    source = source_of(made, exact, quiet)
    adapters = lora_for(dit, made.selection)
    result, _ = train(
        dit, made.selection, source, adapters, plan=made.schedule, clean=made.latents,
        offsets=QuantisationOffsets(exact), steps=7, learning_rate=1e-30,
    )  # fmt: skip
    plain = lora_for(exact, made.selection)
    expected, _ = train(
        exact, made.selection, source_of(made, exact, quiet), plain, plan=made.schedule, clean=made.latents,
        steps=7, learning_rate=1e-30,
    )  # fmt: skip
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(expected.losses), atol=1e-12, rtol=0)


@pytest.mark.parametrize("what", ["examples predicted as loaded", "examples predicted quantised"])
def test_it_can_be_interrupted_and_leaves_both_models_as_they_were(what):
    class Stop(Exception):
        pass

    def progress(phase, done, total):
        if phase == what and done == 2:
            raise Stop

    dit, exact, seen = Rounded(), PlainDit(), Recorder()
    before = dit.weights_hash(), exact.weights_hash(), dit.modules_by_name(), exact.modules_by_name()
    with pytest.raises(Stop):
        losses_of(dit, (1, 1), offsets=QuantisationOffsets(exact, progress, seen.apart), steps=4)
    assert (dit.weights_hash(), exact.weights_hash(), dit.modules_by_name(), exact.modules_by_name()) == before
    assert not seen.inside


def test_a_resumed_run_gives_the_same_lora(tmp_path):
    class Cut(Exception):
        pass

    def cut(report):
        if report.step == 3:
            raise Cut

    def run(folder=None, on_step=None):
        kept = Checkpoints(folder, RunIdentity({"run": "corrected"}), every=1, keep=2) if folder else None
        return losses_of(
            Rounded(), (1, 1), offsets=QuantisationOffsets(PlainDit()), steps=7, checkpoints=kept, on_step=on_step
        )[2]

    whole = run()
    with pytest.raises(Cut):
        run(folder=tmp_path / "run", on_step=cut)
    assert_same(run(folder=tmp_path / "run"), whole)


class OneOff(Rounded):
    """One example is off by more than the error of its weights explains, the others are not."""

    known_error = 0.7

    def __init__(self, sigma):
        super().__init__(0.06)
        self.sigma = sigma

    def running(self, *args, **options):
        @contextmanager
        def placed():
            with super(OneOff, self).running(*args, **options) as denoise:

                def off(noisy, sigmas, captions):
                    estimate = denoise(noisy, sigmas, captions)
                    return estimate + 10 * estimate * (sigmas == self.sigma).view(-1, 1, 1, 1)

                yield off

        return placed()


@pytest.mark.parametrize("stretches", [1, 2])
def test_only_the_first_error_of_enough_examples_is_judged(stretches):
    """Later parts of a run, and a few examples, may contain one that is off by more."""
    chosen, dit = selection(1, 1), OneOff(schedule()[3].sigma)
    source = TwoStretches(chosen) if stretches == 2 else None
    if stretches == 1:
        with pytest.raises(TrainingError, match="predictions differ from those of the model as loaded by"):
            losses_of(dit, (1, 1), source, QuantisationOffsets(PlainDit()), steps=4)
    else:  # two examples at a time
        losses_of(dit, (1, 1), source, QuantisationOffsets(PlainDit()), steps=4)


def test_the_time_of_the_offsets_is_not_that_of_a_step():
    def slow(what, done, total):
        time.sleep(0.1)

    settings = {"offsets": QuantisationOffsets(PlainDit(), slow), "steps": 4}
    chosen, dit = selection(1, 1), Rounded()
    source = MemorySource(PlainDit(), chosen, schedule(), latents())
    result, _ = train(dit, chosen, source, lora_for(dit, chosen), **settings)
    assert max(result.step_seconds) < 0.8  # eight calls take 0.8 seconds


@pytest.mark.parametrize("settings", [{"accumulation": 3}, {"ema": 0.5}, {"batch_size": 3}], ids=str)
def test_without_quantisation_nothing_changes_with_other_settings(settings):
    _, _, plain = losses_of(PlainDit(), (1, 1), steps=4, **settings)
    _, _, corrected = losses_of(PlainDit(), (1, 1), offsets=QuantisationOffsets(PlainDit()), steps=4, **settings)
    assert_same(corrected, plain)


def test_offsets_take_the_dtype_of_the_tokens_and_no_memory_of_the_model():
    offsets = QuantisationOffsets(PlainDit())
    losses_of(Rounded(), (1, 1), offsets=offsets, steps=4)
    kept = offsets.of([2, 0])
    assert kept.shape == (2, *latents().shape[1:])
    assert kept.dtype == torch.float64
    assert kept.device.type == "cpu"
    assert not kept.requires_grad
    assert kept.abs().max() > 1e-3

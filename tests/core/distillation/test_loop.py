"""The distillation on a model in a few lines: it learns, resumes bit for bit, stops by itself, and keeps the best."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.distillation import loop as module
from blockskip_pack.blockskip_core.distillation.examples import LEVELS, SMALLEST_SIGMA, Examples, levels_within
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult, distill
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
from blockskip_pack.blockskip_core.distillation.validation import HeldOut
from blockskip_pack.blockskip_core.errors import InvalidInputError, TrainingError
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity
from torch import nn

SETTINGS = {"steps": 12, "batch_size": 3, "learning_rate": 0.05, "warmup_steps": 2, "validate_every": 4, "seed": 7}


class Tiny:
    """The teacher halves a latent by a caption's factor; the student has to find the factor."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.weight, self.bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))
        self.inside = False
        self.taught = 0

    def teacher(self, noisy, sigmas, captions):
        assert not torch.is_grad_enabled()
        assert not self.inside, "what is trained must not act on the teacher"
        self.taught += len(noisy)
        return self.right(noisy, captions)

    def right(self, noisy, captions):
        return noisy * (0.5 + 0.1 * torch.tensor(captions) % 3)[:, None, None, None]

    def student(self, noisy, sigmas, captions):
        assert self.inside
        return noisy * (self.weight[torch.tensor(captions) % 3] + self.bias)[:, None, None, None]

    def untrained(self, noisy, sigmas, captions):
        return noisy * 0.0

    def attached(self):
        outer = self

        class Inside:
            def __enter__(self):
                outer.inside = True

            def __exit__(self, *_):
                outer.inside = False

        return Inside()

    def text_length(self, caption):
        return 3 + caption % 2

    def check_gradients(self):
        if any(parameter.grad is None for parameter in self.parameters()):
            raise TrainingError("no gradient")

    def parameters(self):
        return [self.weight, self.bias]

    def state_dict(self):
        return {"weight": self.weight.detach().clone(), "bias": self.bias.detach().clone()}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])


class Close(Tiny):
    """A student so near the teacher that the gradients of its numbers are near float16's smallest."""

    computed_in = torch.float32

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.weight += 0.5
            self.bias += 0.5

    def student(self, noisy, sigmas, captions):
        own = (self.weight[torch.tensor(captions) % 3] + self.bias)[:, None, None, None]
        return self.right(noisy, captions) + (noisy.to(self.computed_in) * own.to(self.computed_in)).float() * 3e-4


class Half(Close):
    """The same, computed in float16; the gradients of some steps overflow, as with large activations."""

    dtype = computed_in = torch.float16
    overflow_at = frozenset()

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.bias.register_hook(self._overflow)

    def _overflow(self, gradient):
        self.seen += 1
        return gradient * (float("inf") if self.seen in self.overflow_at else 1.0)


def examples(seed=7, prompts=9):
    latents = torch.randn(2 * prompts, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return Examples(latents, [k // 2 for k in range(2 * prompts)], lambda u: u, seed)


def run(folder=None, cut_after=None, model=None, on_measuring=lambda done, total: None, **settings):
    model, result = model or Tiny(), DistillationResult()
    identity = RunIdentity({"who": "me"})
    checkpoints = folder and Checkpoints(folder / "run", identity, every=5, keep=2)

    def on_step(now):
        if now.steps == cut_after:
            raise KeyboardInterrupt

    try:
        distill(
            model, examples(), DistillationSettings(**{**SETTINGS, **settings}), result=result, checkpoints=checkpoints,
            on_step=on_step, on_measuring=on_measuring,
        )  # fmt: skip
    except KeyboardInterrupt:
        pass
    return model.state_dict(), result


def test_the_held_out_error_falls():
    _, result = run(steps=60, validate_every=20)
    means = [sum(errors) / len(errors) for _, errors in result.measured]
    assert [step for step, _ in result.measured] == [0, 20, 40, 60]
    assert means[-1] < 0.5 * means[0]
    assert result.measured[0][1] == result.untrained  # this student begins with zeros
    assert len(result.losses) == 60
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("cut_after", [1, 4, 7, 12])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path, cut_after):
    expected, whole = run()
    run(tmp_path, cut_after)
    found, resumed = run(tmp_path)
    assert resumed.resumed_at == cut_after
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (resumed.losses, resumed.measured, resumed.best_step) == (whole.losses, whole.measured, whole.best_step)
    assert resumed.untrained == whole.untrained


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("call", [0, 7])
def test_a_run_that_was_cut_off_in_a_measurement_makes_it_when_resumed(tmp_path, at, call):
    """The teacher's pass, the one without training, and those before the first step and after steps 4 and 8."""
    passes = []

    def cut(done, total):
        passes.append(done) if not done else None
        if (len(passes) - 1, done) == (at, call):
            raise KeyboardInterrupt

    expected, whole = run()
    run(tmp_path, on_measuring=cut)
    assert len(passes) == at + 1
    found, resumed = run(tmp_path)
    assert resumed.resumed_at == max(0, at - 2) * 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (resumed.losses, resumed.measured, resumed.best_step) == (whole.losses, whole.measured, whole.best_step)
    assert resumed.untrained == whole.untrained


def test_every_call_of_a_measurement_is_told_with_the_steps_so_far():
    told, model, result = [], Tiny(), DistillationResult()
    distill(
        model, examples(), DistillationSettings(**SETTINGS), result=result,
        on_measuring=lambda done, total: told.append((result.steps, done, total)),
    )  # fmt: skip
    number = len(LEVELS) * module.HELD_OUT_LATENTS
    assert told == [(step, done, number) for step in (0, 0, 0, 4, 8, 12) for done in range(number + 1)]


def test_it_stops_when_the_error_no_longer_falls_and_keeps_the_best(tmp_path):
    """With this rate the first steps overshoot for good."""
    found, result = run(
        tmp_path, learning_rate=50.0, warmup_steps=0, steps=400, validate_every=1, patience=3, max_grad_norm=1e9
    )
    assert result.stopped_early
    assert result.steps == result.best_step + 3 < 400
    assert result.best_errors == min((errors for _, errors in result.measured), key=sum)
    held = HeldOut(model := Tiny(), examples().held_out_batches(module.HELD_OUT_LATENTS))
    model.load_state_dict(found)
    assert held.errors(model.student) == pytest.approx(result.best_errors)
    again, resumed = run(
        tmp_path, learning_rate=50.0, warmup_steps=0, steps=400, validate_every=1, patience=3, max_grad_norm=1e9
    )
    assert (resumed.steps, resumed.stopped_early) == (result.steps, True)
    state = Checkpoints(tmp_path / "run", RunIdentity({"who": "me"}), every=5, keep=2).newest(400)
    assert state.planned == result.steps  # there is nothing to continue
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_no_patience_means_all_steps():
    _, result = run(learning_rate=50.0, patience=0, validate_every=1)
    assert result.steps == 12
    assert not result.stopped_early


def test_the_first_step_is_adam_s_on_the_mean_square_of_the_velocity():
    found, _ = run(steps=1, validate_every=1, warmup_steps=0)
    model = Tiny()
    batch = examples().batch(range(3))
    with torch.no_grad():
        taught = model.teacher(batch.noisy, batch.sigmas, batch.captions)
    model.inside = True
    sigma = batch.sigmas[:, None, None, None]
    error = (batch.noisy - model.student(batch.noisy, batch.sigmas, batch.captions)) / sigma
    target = (batch.noisy - taught) / sigma
    (error - target).square().mean().backward()
    for name, tensor in (("weight", model.weight), ("bias", model.bias)):
        torch.testing.assert_close(found[name], -0.05 * tensor.grad.sign(), rtol=1e-3, atol=1e-6)


def test_examples_depend_on_their_number_and_the_seed_only():
    first, again, other = examples(), examples(), examples(seed=8)
    assert torch.equal(first.batch([3, 5]).noisy, again.batch([1, 3, 5]).noisy[1:])
    assert not torch.equal(first.batch([3]).noisy, other.batch([3]).noisy)
    sigmas = first.batch(range(400)).sigmas
    assert SMALLEST_SIGMA <= float(sigmas.min()) + 1e-6 < 0.1
    assert float(sigmas.max()) > 0.9
    assert len({first.caption_of(number) for number in range(400)}) == 7


def test_every_fifth_example_has_the_negative_caption():
    latents = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    plain, found = (Examples(latents, [0, 0, 1, 1, 2, 2], lambda u: u, 3, negative) for negative in (None, 9))
    assert [number for number in range(20) if found.caption_of(number) == 9] == [0, 5, 10, 15]
    assert found.batch([4, 5]).captions == [plain.caption_of(4), 9]
    assert torch.equal(found.batch([4, 5]).noisy, plain.batch([4, 5]).noisy)


def test_whole_prompts_are_held_out():
    found = examples()
    captions = [k // 2 for k in range(18)]
    assert {captions[k] for k in found.held_out} == {0, 8}
    assert {captions[k] for k in found.trained} == set(range(1, 8))
    batches = found.held_out_batches(3)
    assert [round(float(batch.sigmas[0]), 3) for batch in batches] == [level for level in LEVELS for _ in range(3)]
    with pytest.raises(InvalidInputError, match="At least 2 prompts are needed, .* got 1"):
        Examples(torch.zeros(3, 1, 4, 4), [0, 0, 0], lambda u: u, 0)


@pytest.mark.parametrize(
    ("captions", "measured"),
    [
        ([k // 2 for k in range(64)], [0, 8, 16, 24]),
        ([k // 3 for k in range(33)], [0, 8, 0, 8]),
        (range(40), [0, 8, 16, 24]),
        ([0, 0, 0, 1, 1], [0, 0, 0]),
    ],
)
def test_as_many_held_out_prompts_as_possible_are_measured(captions, measured):
    latents = torch.randn(len(captions), 1, 4, 4, generator=torch.Generator().manual_seed(1))
    found = Examples(latents, captions, lambda u: u, 3, levels=(1e-9,))
    batches = found.held_out_batches(module.HELD_OUT_LATENTS)
    assert [caption for batch in batches for caption in batch.captions] == measured
    chosen = [int((latents - batch.noisy).abs().amax((1, 2, 3)).argmin()) for batch in batches]
    assert len(set(chosen)) == len(batches)
    assert [captions[index] for index in chosen] == measured


def test_errors_are_measured_within_a_range_of_noise_levels():
    own = examples()
    found = Examples(own._latents, own._captions, lambda u: u, 3, levels=levels_within(0.6, 0.8))
    sigmas = [float(batch.sigmas[0]) for batch in found.held_out_batches(1)]
    assert sigmas == pytest.approx([0.61, 0.63, 0.65, 0.67, 0.69, 0.71, 0.73, 0.75, 0.77, 0.79])
    assert levels_within(0.0, 1.0) == tuple((k + 0.5) / 10 for k in range(10))
    errors = HeldOut(Tiny(), found.held_out_batches(2)).errors(lambda noisy, sigmas, captions: noisy)
    assert errors == pytest.approx((1.0,) * 10)


def test_the_error_is_relative_to_the_velocity():
    model = Tiny()
    held = HeldOut(model, examples().held_out_batches(2))
    assert held.errors(lambda noisy, sigmas, captions: model.right(noisy, captions)) == (0.0,) * len(LEVELS)
    assert held.errors(lambda noisy, sigmas, captions: noisy) == pytest.approx((1.0,) * len(LEVELS))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_applied(monkeypatch):
    student = Tiny.student

    def overflowing(self, noisy, sigmas, captions):
        return student(self, noisy, sigmas, captions) * (torch.nan if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(Tiny, "student", overflowing)
    with pytest.raises(TrainingError, match="The loss is not finite in step 1"):
        run()


@pytest.mark.parametrize("what", ["teacher", "untrained", "student"])
def test_a_held_out_error_that_is_not_finite_ends_the_run_in_a_sentence(monkeypatch, what):
    held_out = {index // 2 for index in examples().held_out}
    call = getattr(Tiny, what)

    def overflowing(self, noisy, sigmas, captions):
        return call(self, noisy, sigmas, captions) * (torch.inf if held_out & set(captions) else 1.0)

    monkeypatch.setattr(Tiny, what, overflowing)
    with pytest.raises(TrainingError, match="The held-out error is not finite after step 0. Load the model in bf16"):
        run()


def test_a_held_out_error_that_is_not_finite_is_in_no_saved_state(monkeypatch, tmp_path):
    whole, expected = run()
    student = Tiny.student

    def overflowing(self, noisy, sigmas, captions):
        answer = student(self, noisy, sigmas, captions)
        return answer if torch.is_grad_enabled() or not self.bias else answer * torch.inf

    with monkeypatch.context() as patched:
        patched.setattr(Tiny, "student", overflowing)
        for _ in range(2):
            with pytest.raises(TrainingError, match="The held-out error is not finite after step 4"):
                run(tmp_path)
    found, result = run(tmp_path)
    assert (result.resumed_at, result.measured) == (4, expected.measured)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_gets_no_gradient_ends_the_run_before_the_first_step():
    model = Tiny()
    model.bias.requires_grad_(False)
    with pytest.raises(TrainingError, match="no gradient"):
        run(model=model)
    assert not model.weight.any()


# --- float16 -----------------------------------------------------------------------------------------------------


def first_gradient(model, monkeypatch):
    """Return the gradient of one step's tensors, as it is clipped."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def clipped(parameters, *args):
        found.extend(parameter.grad.clone() for parameter in parameters)
        return clip(parameters, *args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
        run(model=model, steps=1)
    return torch.cat([gradient.reshape(-1) for gradient in found])


def test_small_gradients_are_not_lost_in_float16(monkeypatch):
    exact, half = (first_gradient(kind(), monkeypatch) for kind in (Close, Half))
    assert exact.any()
    assert ((half - exact).norm() / exact.norm()).item() < 0.01


def half(overflow_at=()):
    model = Half()
    model.overflow_at = frozenset(overflow_at)
    return model


def test_a_step_whose_gradient_overflows_in_float16_is_left_out():
    model, after = half({1}), []
    result = DistillationResult()
    distill(
        model, examples(), DistillationSettings(**{**SETTINGS, "steps": 3}), result=result,
        on_step=lambda now: after.append(model.state_dict()),
    )  # fmt: skip
    assert (result.steps, result.overflows, len(result.losses)) == (3, 1, 3)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(after, after[1:], strict=False)]
    assert same == [True, False, False], "only the first step changes nothing"


def test_overflow_after_overflow_ends_the_run():
    with pytest.raises(TrainingError, match="The gradient is not finite in step 20"):
        run(model=half(range(1, 1000)), steps=40, patience=0)


def test_without_float16_a_gradient_that_is_not_finite_ends_the_run():
    model = Tiny()
    model.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="The gradient is not finite in step 1"):
        run(model=model)
    assert not model.weight.any()


def test_a_run_in_float16_that_was_cut_off_ends_with_the_same_bits(tmp_path):
    expected, whole = run(model=half({1}))
    run(tmp_path, 4, model=half({1}))
    state = Checkpoints(tmp_path / "run", RunIdentity({"who": "me"}), every=5, keep=2).newest(99)
    assert state.numbers["loss scale/scale"] == 512.0
    found, resumed = run(tmp_path, model=half())
    assert resumed.resumed_at == 4
    assert (resumed.overflows, whole.overflows) == (1, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (resumed.losses, resumed.measured) == (whole.losses, whole.measured)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"learning_rate": 0.0}, "must be positive and finite"),
     ({"patience": -1}, "must not be negative"), ({"seed": -1}, "seed must be between 0")],
)  # fmt: skip
def test_settings_that_are_refused(setting, message):
    with pytest.raises(InvalidInputError, match=message):
        DistillationSettings(**{**SETTINGS, **setting})


def test_the_rate_rises_and_falls():
    settings = DistillationSettings(steps=100, learning_rate=1.0, warmup_steps=9)
    assert settings.rate_after(0) == pytest.approx(0.1)
    assert settings.rate_after(50) == pytest.approx(0.5)
    assert settings.rate_after(99) < 0.001

"""Decisions while sampling: invariant to the number of steps, held after a switch, ended after a long run."""

import math

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.scheduler import DynamicScheduler, SchedulerSettings
from blockskip_pack.blockskip_core.errors import InvalidInputError

from .test_third_difference import picture, sigmas

FREE = {"hold": 0, "longest_run": 0, "first_own": 0, "last_own": 0}


def run(function, steps, *, error=None, sides=None, **settings):
    """The scales of a run whose clean estimate is ``function`` (sigma), plus ``error`` on coarse steps."""
    scheduler = DynamicScheduler(SchedulerSettings(**settings), sides or {2: 4, 4: 8}, steps)
    scales = []
    for step, sigma in enumerate(sigmas(steps)[:-1]):
        scales.append(scheduler.decide(step, sigma, function(sigma)))
        scheduler.made(sigma, function(sigma) + (error if error is not None and scales[-1] > 1 else 0.0))
    return scales, scheduler


def wave(sigma):
    """Changes fast around 0.5 and slowly elsewhere."""
    return picture() * math.tanh(12 * (sigma - 0.5))


def test_the_same_decisions_at_20_50_and_100_steps():
    chosen = {steps: run(wave, steps, tau=0.004, **FREE)[0] for steps in (20, 50, 100)}
    for steps in (20, 50):
        own = [sigma for sigma, scale in zip(sigmas(steps), chosen[steps], strict=False) if scale == 1][4:]
        finest = [sigma for sigma, scale in zip(sigmas(100), chosen[100], strict=False) if scale == 1][4:]
        assert own
        width = max(a - b for a, b in zip(sigmas(steps), sigmas(steps)[1:], strict=False))
        assert max(own) == pytest.approx(max(finest), abs=2 * width)
        assert min(own) == pytest.approx(min(finest), abs=4 * width)  # it looks back four steps


def test_the_largest_patch_below_the_threshold_is_taken():
    """Detail within 8 x 8 cells and none within 4 x 4."""
    blocks = picture()[:, :1, ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    scales, scheduler = run(lambda sigma: blocks * sigma**3 * 1e4, 10, tau=0.01, **FREE)
    assert scales == [1] * 4 + [2] * 6
    assert scheduler.variations[-1][2] < 0.01 < scheduler.variations[-1][4]
    scales, _ = run(lambda sigma: blocks * sigma, 10, tau=0.01, **FREE)
    assert scales == [1] * 4 + [4] * 6


def test_a_switch_that_shows_in_the_published_form_does_not_show_in_ours():
    scales, _ = run(lambda sigma: picture() * sigma, 30, error=picture(1), hold=0, longest_run=0, sides={2: 4})
    assert scales == [1] * 4 + [2] * 25 + [1]


@pytest.mark.parametrize("hold", [1, 2, 4])
def test_a_size_is_held_after_a_switch(hold, monkeypatch):
    """Whatever the criterion wants: here another size at every step."""
    wanted = iter([1, 2] * 20)
    monkeypatch.setattr(DynamicScheduler, "_wanted", lambda self: next(wanted))
    scales, _ = run(lambda sigma: picture(), 30, hold=hold, longest_run=0, first_own=0, last_own=0)
    changes = [index for index, (a, b) in enumerate(zip(scales, scales[1:], strict=False)) if a != b]
    lengths = {b - a for a, b in zip(changes, changes[1:], strict=False)}
    assert lengths == {hold + (hold + 1) % 2}  # an even number of steps later the size is wanted that is held


def test_a_coarse_run_ends():
    scales, _ = run(lambda sigma: picture() * sigma, 30, longest_run=5, hold=1, sides={2: 4})
    runs = "".join(map(str, scales)).split("1")
    assert max(map(len, runs)) == 5
    assert scales.count(2) > 15


def test_the_first_and_the_last_steps_have_the_models_own_size():
    scales, _ = run(lambda sigma: picture() * sigma, 20, first_own=8, last_own=3, longest_run=0, hold=0)
    assert scales == [1] * 8 + [4] * 9 + [1] * 3


def test_the_published_form_has_no_hold_and_compares_latents():
    settings = {
        "criterion": "third difference (as published)",
        "hold": 9,
        "longest_run": 2,
        "first_own": 0,
        "last_own": 0,
    }
    scales, scheduler = run(lambda sigma: picture() * sigma**0.5, 30, tau=0.05, **settings)
    assert scales[:3] == [1, 1, 1]
    assert scales[3:28] == [4] * 25  # no limit, no hold; and it decides from three earlier latents and the present one
    assert scheduler.variations[2] == {}


def test_a_batch_follows_the_picture_that_varies_most():
    def both(sigma):
        return torch.cat((picture() * 0.0, wave(sigma)))

    assert run(both, 30, tau=0.004, **FREE)[0] == run(wave, 30, tau=0.004, **FREE)[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau": math.nan}, "tau must be positive"),
        ({"percentile": 1.5}, "percentile must be between 0 and 1"),
        ({"criterion": "second"}, "criterion must be one of"),
        ({"hold": -1}, "hold must not be negative"),
    ],
)
def test_what_is_refused(setting, message):
    with pytest.raises(InvalidInputError, match=message):
        SchedulerSettings(**setting)

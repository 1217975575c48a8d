"""Noise levels of the steps that will be coarse: the plans' own steps, evenly shared, and nothing between them."""

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_levels import CoarseSteps
from blockskip_pack.blockskip_core.ddit.plans import EveryOther, TypedWindows
from blockskip_pack.blockskip_core.distillation.examples import SMALLEST_SIGMA, Examples, levels_through
from blockskip_pack.blockskip_core.errors import InvalidInputError

SIGMAS = [1.0, 0.96, 0.9, 0.83, 0.74, 0.62, 0.45, 0.2, 0.0]


def steps_of(scales, scale, sigmas=SIGMAS):
    return tuple((sigmas[k], sigmas[k + 1]) for k, of_step in enumerate(scales) if of_step == scale)


def test_the_steps_are_those_of_the_plans_that_sample():
    every_other = EveryOther(2).begin(SIGMAS, 0).scales
    assert every_other == [1, 2, 1, 2, 1, 2, 1, 1]
    for scale in (2, 4):  # either may be the one that is used
        assert CoarseSteps(8).levels(SIGMAS, scale, [2, 4]).intervals == steps_of(every_other, 2)
    text = "2-4: 2, 6: 4, 8: 2"
    typed = TypedWindows(text, [2, 4]).begin(SIGMAS, 0).scales
    for scale in (2, 4):
        assert CoarseSteps(8, text).levels(SIGMAS, scale, [2, 4]).intervals == steps_of(typed, scale)
    assert (CoarseSteps(8).describe(), CoarseSteps(8, " 2-4: 2 ").describe()) == ("every other of 8", "2-4: 2 of 8")


def test_every_step_has_the_same_share_and_is_filled_evenly():
    levels = CoarseSteps(8).levels(SIGMAS, 2, [2])
    drawn = [levels((k + 0.5) / 300) for k in range(300)]
    assert drawn == sorted(drawn, reverse=True)
    for place, (start, end) in enumerate(levels.intervals):
        own = drawn[100 * place : 100 * place + 100]
        assert own == pytest.approx([start + (k + 0.5) / 100 * (end - start) for k in range(100)])
    assert (levels(0.0), levels(1.0)) == (levels.intervals[0][0], levels.intervals[-1][1])


@pytest.mark.parametrize("windows", [None, "1: 2, 5-6: 2", "8: 2"])
def test_examples_are_drawn_within_these_steps_only(windows):
    levels = CoarseSteps(8, windows).levels(SIGMAS, 2, [2], least=SMALLEST_SIGMA)
    measured = levels_through(levels)
    examples = Examples(torch.zeros(4, 1, 2, 2), [0, 1, 2, 3], levels, 5, levels=measured)
    drawn = examples.batch(range(400)).sigmas.tolist()
    held_out = [batch.sigmas.item() for batch in examples.held_out_batches(1)]
    assert held_out == pytest.approx(measured)
    assert measured == tuple(sorted(set(measured)))
    rounding = 1e-6  # of float32
    for sigma in (*drawn, *held_out):
        assert sum(end - rounding <= sigma <= start + rounding for start, end in levels.intervals) == 1
    for start, end in levels.intervals:
        share = sum(end <= sigma <= start for sigma in drawn) / len(drawn)
        assert share == pytest.approx(1 / len(levels.intervals), abs=0.1)


def test_a_model_for_some_levels_counts_steps_from_its_own_first():
    border, text = 0.83, "2: 2"
    high = CoarseSteps(8, text).levels(SIGMAS, 2, [2], within=(border, 1.0))
    low = CoarseSteps(8, text).levels(SIGMAS, 2, [2], within=(0.0, border))
    assert (high.intervals, low.intervals) == (((0.96, 0.9),), ((0.74, 0.62),))
    between = CoarseSteps(8, "3: 2").levels(SIGMAS, 2, [2], within=(0.87, 1.0))
    assert between.intervals == ((0.9, 0.87),), "the step that crosses the border is its own down to there"
    assert CoarseSteps(8).levels(SIGMAS, 2, [2], within=(0.0, border)).intervals == ((0.74, 0.62), (0.45, 0.2))


@pytest.mark.parametrize(
    ("steps", "windows", "more", "message"),
    [
        (0, None, {}, "needs at least 1 step, got 0"),
        (8, "2..4", {}, "written like `2-9: 2, 12-14: 4`, got '2..4'"),
        (8, "7-9: 2", {}, "not within the steps 1 to 8"),
        (8, "2: 3", {}, "the adapters are for 2"),
        (8, "", {}, "nothing to train patches of 2x on: of the coarse steps, none of 8, none has"),
        (8, "8: 2", {"least": 0.2}, "8: 2 of 8, none has patches of this size and noise levels within 0 to 1"),
        (8, None, {"within": (0.97, 1.0)}, "every other of 8, none has"),
        (8, None, {"within": (0.0, 0.0)}, "every other of 8, none has"),
    ],
)
def test_what_is_refused(steps, windows, more, message):
    with pytest.raises(InvalidInputError, match=message):
        CoarseSteps(steps, windows).levels(SIGMAS, 2, [2], **more)


def test_two_steps_have_none_between_them():
    with pytest.raises(InvalidInputError, match="every other of 2, none has"):
        CoarseSteps(2).levels([1.0, 0.5, 0.0], 2, [2])

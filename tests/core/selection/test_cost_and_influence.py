"""The choice by cost and influence: optimal by brute force, and what it is without a measurement."""

import itertools
import random

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.cost_and_influence import affordable_selection, best_candidate
from blockskip_pack.blockskip_core.selection.text_influence import TextInfluence

GIB = 2**30
FLUX_BYTES = (round(0.633 * GIB),) * 19 + (round(0.264 * GIB),) * 38


def measured(count, rng, budget=None):
    """Distances that mostly rise with the number of masked blocks."""
    front, back = (
        {n: sum(rng.uniform(-0.1, 1.0) for _ in range(n)) for n in range((budget or count - 1) + 1)} for _ in range(2)
    )
    return TextInfluence(count, front={**front, 0: 0.0}, back={**back, 0: 0.0})


def losses_by_brute_force(sizes, least, influence, tails, price):
    """Every subset of blocks that is a run at the front and at most one run in front of a tail -> its loss."""
    count = len(sizes)
    for kept in itertools.product((False, True), repeat=count):
        if sum(size for size, keep in zip(sizes, kept, strict=True) if not keep) < least or not any(kept):
            continue
        runs = [(keep, len(list(run))) for keep, run in itertools.groupby(kept)]
        front = 0 if runs[0][0] else runs.pop(0)[1]
        runs.pop(0)  # the trained middle
        back, tail = (runs[0][1], runs[1][1] if len(runs) > 1 else 0) if runs else (0, 0)
        if len(runs) > 2 or (back and tail not in tails):
            continue
        if influence is None:
            yield price * back
            continue
        there = max(0.0, influence.back[back + tail] - influence.back[tail]) if back else 0.0
        yield influence.front[front] + price * there


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("tails", [(0,), (1, 2, 3), (2,)])
def test_no_other_choice_loses_less(seed, tails):
    rng = random.Random(seed)
    count = rng.randint(4, 9)
    sizes = [rng.randint(1, 9) for _ in range(count)]
    least = round(sum(sizes) * rng.uniform(0.0, 0.6))
    for influence in (measured(count, rng), None):
        expected = min(losses_by_brute_force(sizes, least, influence, tails, 2.0))
        best = best_candidate(sizes, least, influence, tails=tails, back_price=2.0)
        assert best.loss == pytest.approx(expected, abs=1e-12)
        chosen = [*range(best.front), *range(count - best.tail - best.back, count - best.tail)]
        assert best.skipped_bytes == sum(sizes[index] for index in chosen) >= least
        assert (best.back == 0) <= (best.tail == 0)


def test_without_a_measurement_the_front_is_skipped_because_that_is_exact():
    chosen = affordable_selection(0.5, "flux", FLUX_BYTES)
    assert (chosen.front, chosen.back, chosen.tail) == (18, 0, 0)
    assert chosen.skipped_bytes >= 0.5 * sum(FLUX_BYTES) > chosen.skipped_bytes - FLUX_BYTES[0]
    assert "front first. All that is skipped is exact." in chosen.note
    assert chosen.method == "cost and influence"


def test_at_equal_influence_the_front_is_preferred():
    equal = TextInfluence(10, front={n: 0.1 * n for n in range(10)}, back={n: 0.1 * n for n in range(10)})
    chosen = affordable_selection(0.4, "f", (5,) * 10, equal)
    assert (chosen.front, chosen.back, chosen.tail) == (4, 0, 0)


def test_a_front_that_carries_the_subject_is_kept_and_a_tail_left_at_the_end():
    back = {n: 0.0 if n == 0 else 5.0 + 0.01 * n for n in range(10)}  # the last block matters, those before it do not
    influence = TextInfluence(10, front={n: float(n) for n in range(10)}, back=back)
    chosen = affordable_selection(0.4, "f", (5,) * 10, influence)
    assert (chosen.front, chosen.back) == (0, 4)
    assert chosen.tail in (1, 2, 3)
    assert "Predicted loss of influence 0.08" in chosen.note
    assert "4 skipped blocks are approximated." in chosen.note
    exact = affordable_selection(0.4, "f", (5,) * 10, influence, tails=(0,))
    assert (exact.front, exact.back, exact.tail) == (4, 0, 0)  # the span would have to contain the last block


def test_only_measured_spans_are_chosen():
    influence = measured(10, random.Random(1), budget=4)
    best = best_candidate((1,) * 10, 4, influence)
    assert best.front <= 4
    assert best.back + best.tail <= 4
    with pytest.raises(InvalidInputError, match="within the spans that were measured"):
        best_candidate((1,) * 10, 9, influence)


@pytest.mark.parametrize("ratio", [-0.1, 0.95, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(InvalidInputError, match=r"skip_ratio must be between 0 and 0\.9"):
        affordable_selection(ratio, "f", (1, 1, 1))


def test_a_ratio_that_leaves_no_block_is_refused():
    with pytest.raises(InvalidInputError, match=r"and keeps one to train\. Lower skip_ratio\."):
        affordable_selection(0.9, "f", (1, 1, 1))

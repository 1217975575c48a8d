"""Fixed schedules: typed windows, and the best within a budget, against all schedules."""

import itertools

import pytest
from blockskip_pack.blockskip_core.ddit.error_table import ErrorTable, spent
from blockskip_pack.blockskip_core.ddit.plans import EveryOther
from blockskip_pack.blockskip_core.ddit.windows import scales_in_windows, scales_within_budget
from blockskip_pack.blockskip_core.errors import InvalidInputError

TABLES = {2: ErrorTable((0.2, 0.8), (0.3, 0.1)), 4: ErrorTable((0.2, 0.8), (0.7, 0.25))}
OPERATIONS = {1: 10.0, 2: 3.0, 4: 1.0}


def saved(scales):
    return sum(OPERATIONS[1] - OPERATIONS[scale] for scale in scales)


def test_windows_are_read():
    assert scales_in_windows("2-4: 2, 6:4", 7, [2, 4]) == [1, 2, 2, 2, 1, 4, 1]
    assert scales_in_windows(" ", 3, [2]) == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2..4: 2", "written like `2-9: 2, 12-14: 4`, got '2..4: 2'"),
        ("5-4: 2", "not within the steps 1 to 7"),
        ("0-2: 2", "not within the steps 1 to 7"),
        ("6-9: 2", "not within the steps 1 to 7"),
        ("1: 3", "the adapters are for 2, 4"),
        ("1-3: 2, 3-4: 4", "overlaps another"),
    ],
)
def test_windows_that_are_refused(text, message):
    with pytest.raises(InvalidInputError, match=message):
        scales_in_windows(text, 7, [2, 4])


def test_errors_are_interpolated():
    table = TABLES[2]
    assert [table.at(x) for x in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([0.3, 0.3, 0.2, 0.1, 0.1])
    assert table.mean == pytest.approx(0.2)
    with pytest.raises(InvalidInputError, match="rising noise levels"):
        ErrorTable((0.5, 0.5), (1.0, 1.0))
    with pytest.raises(InvalidInputError, match="rising noise levels"):
        ErrorTable((0.5,), (float("nan"),))


def test_what_a_schedule_spends():
    assert spent([1, 2, 1], [1.0, 0.8, 0.3, 0.0], TABLES) == pytest.approx(0.5 * 0.1)


@pytest.mark.parametrize("budget", [0.0, 0.03, 0.08, 0.15, 0.4, 1.0])
def test_the_best_schedule_within_a_budget_against_all_schedules(budget):
    sigmas = [1.0, 0.93, 0.81, 0.7, 0.52, 0.3, 0.11, 0.0]
    found = scales_within_budget(sigmas, TABLES, OPERATIONS, budget)
    assert spent(found, sigmas, TABLES) <= budget
    assert (found[0], found[-1]) == (1, 1)
    every = itertools.product((1, 2, 4), repeat=5)
    best = max(saved(s) for s in every if spent([1, *s, 1], sigmas, TABLES) <= budget * (1 - 5 / 4000))
    assert saved(found) >= best


def test_where_errors_are_small_steps_are_coarse_first():
    sigmas = [x / 20 for x in range(20, -1, -1)]
    found = scales_within_budget(sigmas, {2: TABLES[2]}, OPERATIONS, 0.05)
    coarse = [step for step, scale in enumerate(found) if scale == 2]
    assert coarse == list(range(1, 1 + len(coarse)))
    assert 3 < len(coarse) < 19


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(InvalidInputError, match="between 0 and 1, got 1.5"):
        scales_within_budget([1.0, 0.0], TABLES, OPERATIONS, 1.5)
    with pytest.raises(InvalidInputError, match="Noise levels must fall"):
        scales_within_budget([1.0, 1.0], TABLES, OPERATIONS, 0.5)


@pytest.mark.parametrize(
    ("first_own", "last_own", "scales"),
    [(1, 1, [1, 2, 1, 2, 1, 1]), (0, 0, [2, 1, 2, 1, 2, 1]), (2, 2, [1, 1, 2, 1, 1, 1]), (4, 4, [1] * 6)],
)
def test_every_other_step(first_own, last_own, scales):
    assert EveryOther(2, first_own, last_own).begin([1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0], 16).scales == scales

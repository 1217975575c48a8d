"""Which example each step uses."""

from collections import Counter

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.zoodip.examples import ExampleSchedule


def schedule(pool=0, *, seed=0, pictures=3, lowest=0.2, highest=0.8, mirror=False):
    return ExampleSchedule(seed, pictures, lowest=lowest, highest=highest, pool=pool, mirror=mirror)


def test_a_round_uses_every_fixed_example_once_in_a_new_order():
    examples = schedule(12)
    rounds = [[examples[round_ * 12 + place] for place in range(12)] for round_ in range(3)]
    assert len(set(rounds[0])) == 12
    assert set(rounds[0]) == set(rounds[1]) == set(rounds[2])
    assert rounds[0] != rounds[1] != rounds[2]


def test_every_stratum_of_noise_levels_and_every_picture_occurs_equally_often():
    examples = [schedule(12)[step] for step in range(12)]
    strata = [int((example.level - 0.2) / 0.6 * 12) for example in examples]
    assert sorted(strata) == list(range(12))
    assert Counter(example.picture for example in examples) == {0: 4, 1: 4, 2: 4}
    assert not any(example.mirrored for example in examples)


@pytest.mark.parametrize("pool", [0, 7])
def test_noise_levels_stay_between_their_bounds_and_fill_the_range(pool):
    levels = [schedule(pool)[step].level for step in range(400)]
    assert 0.2 <= min(levels) < 0.3
    assert 0.7 < max(levels) <= 0.8
    assert sum(levels) / len(levels) == pytest.approx(0.5, abs=0.06)


def test_without_a_pool_every_step_draws_a_new_example_uniformly():
    examples = [schedule(mirror=True)[step] for step in range(600)]
    assert len({example.noise_seed for example in examples}) == 600
    assert min(Counter(example.picture for example in examples).values()) > 150
    assert 240 < sum(example.mirrored for example in examples) < 360


@pytest.mark.parametrize("pool", [0, 5])
def test_an_example_depends_on_seed_and_step_alone(pool):
    state = torch.get_rng_state()
    late, early = schedule(pool)[41], schedule(pool)
    assert [early[step] for step in range(42)][41] == late
    assert torch.equal(torch.get_rng_state(), state)
    assert schedule(pool, seed=1)[41] != late
    assert torch.equal(late.noise((2, 3)), late.noise((2, 3)))
    assert late.noise((2, 3)).dtype == torch.float32


def test_the_examples_of_a_check_cover_all_noise_levels():
    assert sorted(int((e.level - 0.2) / 0.6 * 6) for e in schedule().spread(6)) == list(range(6))


@pytest.mark.parametrize(
    "wrong",
    [{"pictures": 0}, {"pool": -1}, {"lowest": 0.8}, {"lowest": -0.1}, {"highest": 1.1}, {"highest": float("nan")}],
)
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(InvalidInputError):
        schedule(**wrong)

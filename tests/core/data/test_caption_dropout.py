"""Which training examples lose their caption."""

import pytest
from blockskip_pack.blockskip_core.data.caption_dropout import dropped_draws


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.004, 0), (0.1, 10), (0.25, 25), (1.0, 100)])
def test_the_share_is_exact_and_no_example_comes_twice(share, count):
    found = dropped_draws(100, share, seed=7)
    assert len(set(found)) == len(found) == count
    assert found == sorted(found)
    assert set(found) <= set(range(100))


def test_the_seed_decides_and_the_same_seed_gives_the_same_examples_everywhere():
    assert dropped_draws(20, 0.25, seed=3) == dropped_draws(20, 0.25, seed=3) == PINNED
    assert dropped_draws(20, 0.25, seed=4) != PINNED


PINNED = [0, 3, 5, 8, 18]

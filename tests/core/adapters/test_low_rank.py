"""Low-rank changes: joining, padding and truncating keep ``up @ down``."""

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.low_rank import LowRank, filled_up, joined, smallest


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(change):
    return change.up @ change.down


def test_a_change_that_was_split_is_joined_to_what_it_was_bit_for_bit():
    up, down = random(9, 2), random(2, 5, seed=1)
    parts = [LowRank(up[2:6], down.clone(), 2), LowRank(up[6:], down.clone(), 6), LowRank(up[:2], down.clone(), 0)]
    whole = joined(parts, 9)
    assert torch.equal(whole.up, up)
    assert torch.equal(whole.down, down)


def test_parts_of_their_own_add_their_ranks_and_rows_without_a_part_stay():
    parts = [LowRank(random(3, 2), random(2, 8, seed=1), 0), LowRank(random(4, 3, seed=2), random(3, 8, seed=3), 5)]
    whole = joined(parts, 9)
    expected = torch.zeros(9, 8, dtype=torch.float64)
    expected[:3] += parts[0].up @ parts[0].down
    expected[5:] += parts[1].up @ parts[1].down
    assert whole.rank == 5
    torch.testing.assert_close(product(whole), expected, atol=1e-14, rtol=0.0)


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (8, 3), (4, 4)])
def test_a_rank_above_the_smaller_side_is_cut_down_exactly(rows, columns):
    change = LowRank(random(rows, 7), random(7, columns, seed=1))
    small = smallest(change)
    assert small.rank == min(rows, columns)
    torch.testing.assert_close(product(small), product(change), atol=1e-13, rtol=0.0)
    assert smallest(small) is small


def test_filling_up_changes_nothing_and_takes_the_new_directions_from_elsewhere():
    change, fresh = LowRank(random(6, 2), random(2, 5, seed=1)), random(4, 5, seed=2)
    filled = filled_up(change, fresh)
    assert torch.equal(filled.down, torch.cat((change.down, fresh[2:])))
    assert torch.equal(filled.up[:, :2], change.up)
    assert not filled.up[:, 2:].any()
    same = filled_up(change, random(2, 5))
    assert torch.equal(same.up, change.up)
    assert torch.equal(same.down, change.down)
    with pytest.raises(ValueError, match="rank 4 cannot be padded to rank 2"):
        filled_up(filled, fresh[:2])

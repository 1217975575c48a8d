"""A few first blocks skipped, twice as many last ones frozen."""

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.skip_and_freeze import MAX_RATIO, skip_and_freeze

from .test_selection import FLUX_BLOCKS


@pytest.mark.parametrize(
    ("ratio", "num_blocks", "chosen"),
    [
        (0.5, 12, (3, 6)),
        (0.5, FLUX_BLOCKS, (14, 29)),
        (0.6, FLUX_BLOCKS, (17, 34)),
        (0.5, 60, (15, 30)),
        (0.0, 12, (0, 0)),
    ],
)
def test_half_of_the_ratio_is_skipped_and_all_of_it_frozen(ratio, num_blocks, chosen):
    selection = skip_and_freeze(ratio, num_blocks, "flux")
    assert (selection.front, selection.frozen) == chosen
    assert (selection.back, selection.tail, selection.method) == (0, 0, "skip and freeze")
    assert selection.with_exact_back() == selection, "nothing is left that a residual could replace"


def test_half_of_the_bytes_of_a_model_in_16_bits_are_not_needed():
    selection = skip_and_freeze(0.5, 60, "qwen_image", (2,) * 60)
    held = sum(1 if index in selection.frozen_span else 2 for index in selection.kept)
    assert held == 60
    assert "Skip the first 15 of 60 blocks (25%); train 15.\nThe last 30 also run in training" in selection.describe()


@pytest.mark.parametrize("num_blocks", range(4, 81))
def test_a_block_is_left_to_train_at_every_depth(num_blocks):
    assert len(skip_and_freeze(0.5, num_blocks, "flux").adapted) >= 1


@pytest.mark.parametrize("ratio", [-0.1, MAX_RATIO + 0.01])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(InvalidInputError, match=f"between 0 and 0.6 for `skip and freeze`.*got {ratio}"):
        skip_and_freeze(ratio, 12, "flux")


def test_a_model_of_three_blocks_has_none_left():
    with pytest.raises(
        InvalidInputError, match="would skip 1 and freeze 2 of 3 blocks and leave none to train. Lower it"
    ):
        skip_and_freeze(0.5, 3, "flux")

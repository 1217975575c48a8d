"""Selections: their counts, spans, bytes and fingerprints."""

import itertools

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.selection import BlockSelection, num_skipped

FLUX_BLOCKS = 57


@pytest.mark.parametrize(("ratio", "count"), [(0.3, 17), (0.4, 23), (0.5, 29), (0.0, 0), (0.9, 51)])
def test_ratios_skip_as_many_flux_blocks_as_in_the_paper(ratio, count):
    assert num_skipped(ratio, FLUX_BLOCKS) == count


def test_halves_are_rounded_up_whatever_the_binary_fraction():
    assert num_skipped(0.15, 10) == 2
    assert num_skipped(0.35, 10) == 4
    assert num_skipped(0.29, 50) == 15  # 0.29 * 50 is 14.499999999999998 in binary


@pytest.mark.parametrize("ratio", [-0.1, 0.91, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(InvalidInputError, match=r"skip_ratio must be between 0 and 0\.9"):
        num_skipped(ratio, FLUX_BLOCKS)


def test_a_ratio_that_leaves_no_block_is_refused():
    with pytest.raises(InvalidInputError, match="would skip all 2 blocks"):
        num_skipped(0.8, 2)


def test_front_and_back_and_kept_are_the_blocks_in_order():
    for num_blocks in range(1, 9):
        for front, back in itertools.product(range(num_blocks), repeat=2):
            if front + back >= num_blocks:
                continue
            chosen = BlockSelection(front=front, back=back, num_blocks=num_blocks)
            assert [*chosen.front_span, *chosen.kept, *chosen.back_span] == list(range(num_blocks))
            assert (len(chosen.front_span), len(chosen.back_span)) == (front, back)


@pytest.mark.parametrize(
    ("front", "back", "message"),
    [(-1, 0, "must not be negative"), (0, -1, "must not be negative"), (3, 2, "at most 4"), (5, 0, "leaves none")],
)
def test_impossible_selections_are_refused(front, back, message):
    with pytest.raises(InvalidInputError, match=message):
        BlockSelection(front=front, back=back, num_blocks=5)


def test_bytes_are_those_of_the_blocks_on_either_side():
    chosen = BlockSelection(front=1, back=2, num_blocks=5, block_bytes=(1, 20, 300, 4000, 50000))
    assert chosen.kept_bytes == 320
    assert chosen.skipped_bytes == 54001
    text = chosen.describe()
    assert "Skip the first 1 and the last 2 of 5 blocks (60%); train 2." in text
    assert "kept 320 B" in text


def test_the_fingerprint_follows_the_blocks_and_the_family_only():
    settings = {"front": 1, "back": 2, "num_blocks": 6, "family": "flux"}
    base = BlockSelection(**settings)
    for change in ({"front": 0}, {"back": 1}, {"num_blocks": 7}, {"family": "other"}, {"front": 2, "back": 1}):
        assert BlockSelection(**{**settings, **change}).fingerprint != base.fingerprint
    told = BlockSelection(**settings, method="preset", note="a note", block_bytes=(1,) * 6)
    assert told.fingerprint == base.fingerprint


def test_an_exact_back_runs_and_has_no_adapters():
    chosen = BlockSelection(front=2, back=3, num_blocks=10).with_exact_back()
    assert (chosen.front, chosen.back, chosen.frozen) == (2, 0, 3)
    assert list(chosen.kept) == list(range(2, 10))
    assert list(chosen.adapted) == list(range(2, 7))
    assert list(chosen.frozen_span) == [7, 8, 9]
    assert list(chosen.back_span) == []
    assert "train 5" in chosen.describe()
    assert "The last 3 also run in training, without adapters." in chosen.describe()


def test_a_tail_follows_the_skipped_back():
    for front, back, tail in itertools.product(range(4), range(4), range(4)):
        if front + back + tail >= 8:
            continue
        chosen = BlockSelection(front=front, back=back, num_blocks=8, tail=tail)
        parts = [*chosen.front_span, *chosen.middle, *chosen.back_span, *chosen.tail_span]
        assert parts == list(range(8))
        assert list(chosen.kept) == list(chosen.adapted) == [*chosen.middle, *chosen.tail_span]
        frozen = chosen.with_exact_back()
        assert list(frozen.frozen_span) == list(chosen.back_span)
        assert list(frozen.adapted) == list(chosen.adapted)
        assert list(frozen.kept) == list(range(front, 8))


def test_a_tail_is_part_of_the_fingerprint_only_where_it_changes_residuals():
    settings = {"front": 1, "num_blocks": 9, "family": "flux"}
    prints = {BlockSelection(back=3, tail=tail, **settings).fingerprint for tail in range(3)}
    assert len(prints) == 3
    front_alone = BlockSelection(back=0, **settings)
    assert BlockSelection(back=0, tail=2, **settings).fingerprint == front_alone.fingerprint
    assert BlockSelection(back=3, tail=2, **settings).with_exact_back().fingerprint == front_alone.fingerprint


def test_the_fingerprint_of_the_papers_form_is_that_of_earlier_versions():
    """Stored residuals are found by it."""
    chosen = BlockSelection(front=19, back=10, num_blocks=57, family="flux")
    assert chosen.fingerprint == "49ec27c0ed22866646c041c5695de2c9"


def test_a_tail_is_described():
    chosen = BlockSelection(front=2, back=3, num_blocks=10, tail=2)
    assert "Skip the first 2 and 3 in front of the last 2 of 10 blocks (50%); train 5." in chosen.describe()
    assert "3 in front of the last 2 also run in training, without adapters." in chosen.with_exact_back().describe()


@pytest.mark.parametrize(("front", "back", "tail"), [(2, 2, 1), (0, 1, 4), (0, 0, -1), (0, 0, 5)])
def test_a_tail_that_leaves_no_block_before_the_back_is_refused(front, back, tail):
    with pytest.raises(InvalidInputError, match="none to train between them|tail must not be negative"):
        BlockSelection(front=front, back=back, num_blocks=5, tail=tail)


def test_frozen_blocks_have_no_residuals_so_they_do_not_decide_them():
    front_only = BlockSelection(front=2, back=0, num_blocks=10)
    assert BlockSelection(front=2, back=3, num_blocks=10).with_exact_back().fingerprint == front_only.fingerprint


@pytest.mark.parametrize(("front", "back", "frozen"), [(0, 0, 10), (3, 3, 4), (0, 0, -1)])
def test_frozen_blocks_count_like_skipped_ones(front, back, frozen):
    with pytest.raises(InvalidInputError):
        BlockSelection(front=front, back=back, num_blocks=10, frozen=frozen)

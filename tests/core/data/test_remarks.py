"""Remarks on pictures and captions: they name the pictures, and there are none if nothing is odd."""

from __future__ import annotations

import pytest
from blockskip_pack.blockskip_core.data import remarks
from blockskip_pack.blockskip_core.data.remarks import Labels
from blockskip_pack.blockskip_core.errors import InvalidInputError


def test_pictures_are_named_by_file_or_by_number():
    assert Labels(3).full(1) == "Picture 2 of 3"
    assert Labels(3, ["a", "b", "c"]).full(1) == "Picture 2 of 3 (b)"
    assert Labels(3).listed([0, 2]) == "number 1, number 3"
    assert Labels(3, ["a", "b", "c"]).listed([0, 2], ["white", "black"]) == "a (white), c (black)"


def test_a_long_list_ends_with_how_many_more_there_are():
    assert Labels(99).listed(range(8)).endswith("number 5, number 6 and 2 more")
    assert Labels(99).listed(range(6)).endswith("number 5, number 6")


def test_a_picture_that_counts_several_times_is_named_once():
    assert Labels(4, ["a", "a", "a", "b"]).listed([0, 1, 2, 3]) == "a, b"


def test_names_that_are_not_one_for_each_are_refused():
    with pytest.raises(InvalidInputError, match="`files` describes 2 pictures, and 3 came in"):
        Labels(3, ["a", "b"])


def test_nothing_is_said_of_nothing():
    labels = Labels(2)
    assert remarks.on_size([(64, 64), (64, 90)], [(64, 64)] * 2, labels) is None
    assert remarks.on_blank({}, labels) is None
    assert remarks.on_transparent([], labels) is None
    assert remarks.put_on_white([], labels) is None
    assert remarks.on_guessed_texts([], labels) is None
    assert remarks.on_empty_captions(["a toy", "a dog"], labels) is None
    assert remarks.on_zeroed_captions(0, 2) is None
    assert remarks.on_equal_captions(["x", "y"], ["1", "2"]) is None


def test_sizes_are_columns_by_rows():
    sentence = remarks.on_size([(63, 400), (64, 64), (20, 30)], [(64, 64)] * 3, Labels(3))
    assert sentence.startswith(
        "2 of 3 pictures are smaller than the patch of 64 px: number 1 (400 x 63 px), number 3 (30 x 20 px)."
    )


@pytest.mark.parametrize(
    ("captions", "pictures", "beginning"),
    [("aa", "12", "All 2 captions are the same"), ("aab", "123", None), ("aaab", "1234", "3 of 4 captions are the same"),
     ("aaaa", "1111", None), ("abab", "1212", None), ("aaaaaa", "121212", "All 2 captions are the same")],
)  # fmt: skip
def test_captions_are_counted_over_different_pictures(captions, pictures, beginning):
    said = remarks.on_equal_captions(captions, pictures)
    assert said is None if beginning is None else said.startswith(beginning)

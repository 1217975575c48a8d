"""A word as vectors by encoder, and as one row."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.zoodip.word import WordLayout, WordPart

PARTS = (WordPart("clip_l", 2, 3, 0.5), WordPart("t5xxl", 1, 4, 8.0))


def test_a_row_and_its_parts_are_the_same_numbers():
    layout = WordLayout(PARTS)
    row = torch.arange(10.0)
    parts = layout.split(row)
    assert parts["clip_l"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["t5xxl"].tolist() == [[6, 7, 8, 9]]
    assert torch.equal(layout.join(parts), row)
    assert layout.numbers == 10


def test_every_number_has_the_unit_of_its_encoder():
    assert WordLayout(PARTS).sizes.tolist() == [0.5] * 6 + [8.0] * 4


@pytest.mark.parametrize(
    "parts",
    [(), (PARTS[0], PARTS[0]), (WordPart("a", 0, 3, 1.0),), (WordPart("a", 1, 0, 1.0),), (WordPart("a", 1, 3, 0.0),),
     (WordPart("a", 1, 3, float("nan")),)],
)  # fmt: skip
def test_a_layout_without_a_meaning_is_refused(parts):
    with pytest.raises(InvalidInputError):
        WordLayout(parts)


@pytest.mark.parametrize("vectors", [{}, {"clip_l": torch.zeros(1, 3), "t5xxl": torch.zeros(1, 4)}])
def test_vectors_that_do_not_fit_are_refused(vectors):
    with pytest.raises(InvalidInputError, match="clip_l must have shape"):
        WordLayout(PARTS).join(vectors)

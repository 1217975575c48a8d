"""Operations by number of tokens: through three counts, and what a schedule saves."""

import pytest
from blockskip_pack.blockskip_core.ddit.operations import StepOperations, share_saved
from blockskip_pack.blockskip_core.errors import InvalidInputError


def test_three_counts_give_any_other():
    def counted(tokens, text=7, width=11):
        """A block by hand: projections over all tokens, attention over all pairs."""
        return 24 * width**2 * (tokens + text) + 4 * width * (tokens + text) ** 2

    found = StepOperations.through({tokens: counted(tokens) for tokens in (16, 64, 144)}, 7)
    for tokens in (1, 36, 4096):
        assert found.own(tokens) == pytest.approx(counted(tokens))
    assert found.coarse(4096, 4, 0) == pytest.approx(counted(256))
    assert found.coarse(4096, 4, 10) == pytest.approx(counted(256) + 20 * (256 + 7))


def test_the_share_saved():
    assert share_saved([1, 2, 2, 1], {1: 10.0, 2: 4.0}) == pytest.approx(0.3)
    assert share_saved([1, 1], {1: 10.0}) == 0.0


def test_two_counts_are_refused():
    with pytest.raises(InvalidInputError, match="counted at 3 numbers"):
        StepOperations.through({1: 1.0, 2: 2.0}, 0)

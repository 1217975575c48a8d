"""The subspace gradient: what is removed, and when."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.zoodip.subspace import SubspaceGradient, minor_components, without


def words(count=12, numbers=20, seed=0):
    """A smooth path, as of a word in training: few directions explain most of its variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, numbers, generator=generator, dtype=torch.float64).cumsum(0).cumsum(0)


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5])
def test_a_projection_applied_twice_is_applied_once(share):
    found = minor_components(words(), share)
    assert 0 < len(found) < 12
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=torch.float64))
    gradient = words(1, seed=4)[0]
    once = without(gradient, found)
    torch.testing.assert_close(without(once, found), once)
    torch.testing.assert_close(found @ once, torch.zeros(len(found), dtype=torch.float64))


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5])
def test_the_removed_components_are_those_after_the_first_that_explains_enough(share):
    """Eq. 4 to 7 from the covariance matrix of the standardised words instead of their singular values."""
    buffer = words()
    standard = (buffer - buffer.mean(0)) / buffer.std(0, unbiased=False)
    variances, vectors = torch.linalg.eigh(standard.T @ standard)
    variances, vectors = variances.flip(0), vectors.flip(1)
    explained = variances.cumsum(0) / variances.sum()
    first = int((explained > 1.0 - share).nonzero()[0])
    expected = vectors[:, first + 1 : 11]  # 12 words have 11 directions of variance
    found = minor_components(buffer, share)
    torch.testing.assert_close(found.T @ found, expected @ expected.T)


def test_words_that_stand_still_remove_nothing():
    assert len(minor_components(torch.ones(5, 8, dtype=torch.float64), 1e-3)) == 0


def test_a_number_that_stands_still_does_not_spoil_the_others():
    buffer = words()
    buffer[:, 3] = 7.0
    found = minor_components(buffer, 0.05)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 3], torch.zeros(len(found), dtype=torch.float64))


def test_nothing_is_removed_in_the_first_steps_and_each_decomposition_starts_anew():
    subspace, path = SubspaceGradient(20, 5, 0.2), words(15)
    gradient = words(1, seed=4)[0]
    for step in range(15):
        expected = (
            gradient if step < 5 else without(gradient, minor_components(path[step // 5 * 5 - 5 : step // 5 * 5], 0.2))
        )
        torch.testing.assert_close(subspace.project(gradient), expected)
        assert (subspace.num_removed > 0) == (step >= 5)
        subspace.add(path[step])


def test_it_can_be_off():
    subspace = SubspaceGradient(20, 0, 1e-3)
    for word in words():
        subspace.add(word)
    assert subspace.num_removed == 0
    assert len(subspace.state()["words"]) == 0


@pytest.mark.parametrize(("every", "share"), [(-1, 0.1), (1, 0.1), (5, 0.0), (5, 1.0)])
def test_settings_without_a_meaning_are_refused(every, share):
    with pytest.raises(InvalidInputError, match="between decompositions"):
        SubspaceGradient(20, every, share)

"""Noise matching against Eq. 7 and its covariance, in float64."""

import math

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.ralu.noise_matching import correlated, restart_after, restarted, seeded_noise

ENDS = (0.2, 0.3, 0.45, 0.9)
CORRELATIONS = (0.0177, 0.0586, 0.25)
EVERY_KIND = [(False, False), (False, True), (True, True)]  # (fine before, fine after) of a group


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_a_restart_solves_its_three_equations(end, correlation):
    """From appendix A.1: a e = s, a (1 - e) = b sqrt(c), b = 1 - s."""
    restart = restart_after(end, correlation)
    assert restart.scale * end == pytest.approx(restart.start, abs=1e-15)
    assert restart.scale * (1.0 - end) == pytest.approx(restart.noise * math.sqrt(correlation), abs=1e-15)
    assert restart.noise == pytest.approx(1.0 - restart.start, abs=1e-15)
    assert restart.start < end


@pytest.mark.parametrize(
    ("ends", "root", "starts", "scales", "noises"),
    [
        ((0.3, 0.45), 7.52, (0.0539, 0.0982), (0.1798, 0.2181), (0.9461, 0.9018)),
        ((0.2, 0.3), 6.261, (0.0384, 0.0641), (0.1920, 0.2136), (0.9616, 0.9359)),
        ((0.3, 0.45), 6.317, (0.0635, 0.1147), (0.2118, 0.2548), (0.9365, 0.8853)),
    ],
    ids=["5x", "7x", "4x"],
)
def test_restarts_of_the_published_settings(ends, root, starts, scales, noises):
    restarts = [restart_after(end, root**-2) for end in ends]
    assert [r.start for r in restarts] == pytest.approx(starts, abs=5e-4)
    assert [r.scale for r in restarts] == pytest.approx(scales, abs=5e-4)
    assert [r.noise for r in restarts] == pytest.approx(noises, abs=5e-4)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_the_cheap_square_root_is_one(correlation):
    root = correlated(torch.eye(4, dtype=torch.float64), correlation, dim=1)
    expected = torch.eye(4, dtype=torch.float64) - correlation
    torch.testing.assert_close(root @ root.T, expected, rtol=0, atol=1e-15)


def covariance_of(restart, before, after):
    """Return the exact covariance of a group's four tokens after a restart; noise is linear, so unit vectors suffice.

    The latent's own noise has variance (1 - e)^2; a coarse token's four copies share it.
    """
    end = restart.start / restart.scale
    flags = torch.tensor([[before]]), torch.tensor([[after]])
    unit = torch.eye(4, dtype=torch.float64)
    none = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    own = (unit if before else torch.ones(4, 4, dtype=torch.float64) / 2) * (1.0 - end)
    parts = [restarted(own[None, None], *flags, restart, none), restarted(none, *flags, restart, unit[None, None])]
    return sum(part[0, 0] @ part[0, 0].T for part in parts)


@pytest.mark.parametrize(("before", "after"), EVERY_KIND)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_a_restarted_latent_has_the_covariance_that_the_model_knows(end, correlation, before, after):
    """(1 - s)^2 I for fine tokens, (1 - s)^2 everywhere for a coarse one that is repeated four times."""
    restart = restart_after(end, correlation)
    shape = torch.eye(4, dtype=torch.float64) if after else torch.ones(4, 4, dtype=torch.float64)
    expected = (1.0 - restart.start) ** 2 * shape
    torch.testing.assert_close(covariance_of(restart, before, after), expected, rtol=0, atol=1e-14)


def test_the_covariance_shows_in_samples_too():
    """All three kinds of groups at once, with the actual random noise; a million samples, four sigma."""
    end, correlation, count = 0.3, 0.0177, 2**18
    restart = restart_after(end, correlation)
    drawn = seeded_noise((1, 3, 4, count), seed=5, stage=1).double()
    added = seeded_noise((1, 3, 4, count), seed=5, stage=2).double()
    before, after = (torch.tensor([[kind[i] for kind in EVERY_KIND]]) for i in (0, 1))
    drawn[0, 0], drawn[0, 1] = drawn[0, 0, :1], drawn[0, 1, :1]
    found = restarted((1.0 - end) * drawn, before, after, restart, added)[0]
    assert torch.equal(found[0], found[0, :1].expand(4, -1))
    level = (1.0 - restart.start) ** 2
    for group, shape in zip(found, (torch.ones(4, 4), torch.eye(4), torch.eye(4)), strict=True):
        torch.testing.assert_close(group @ group.T / count, level * shape.double(), rtol=0, atol=4 * 2**0.5 * 2**-9)


def test_a_clean_latent_is_scaled_to_the_new_time():
    """The mean is s x_1 if it was e x_1."""
    restart = restart_after(0.45, 0.0177)
    clean = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    flags = torch.zeros(1, 2, dtype=torch.bool)
    found = restarted(0.45 * clean, flags, ~flags, restart, torch.zeros_like(clean))
    torch.testing.assert_close(found, restart.start * clean)


def test_noise_of_a_picture_does_not_depend_on_the_rest_of_the_batch():
    batch = seeded_noise((3, 5, 4, 2), seed=7, stage=2)
    assert torch.equal(batch[:1], seeded_noise((1, 5, 4, 2), seed=7, stage=2))
    assert len({float(sample.sum()) for sample in batch}) == 3


def test_noise_differs_by_seed_and_stage_and_repeats():
    drawn = [seeded_noise((1, 5), seed, stage) for seed, stage in ((0, 1), (1, 0), (0, 2), (2**64 - 1, 1))]
    assert len({float(noise.sum()) for noise in drawn}) == 4
    assert torch.equal(drawn[0], seeded_noise((1, 5), 0, 1))


@pytest.mark.parametrize("end", [0.0, 1.0, -0.1, math.nan])
def test_an_end_that_cannot_be_restarted_from_is_refused(end):
    with pytest.raises(InvalidInputError, match="must end between 0 and 1"):
        restart_after(end, 0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.26, -1.0, math.nan])
def test_a_correlation_without_a_square_root_is_refused(correlation):
    with pytest.raises(InvalidInputError, match="above 0 and at most 0.25"):
        restart_after(0.3, correlation)

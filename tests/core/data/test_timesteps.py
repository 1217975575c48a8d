"""Noise level distributions."""

import math

import pytest
import torch
from blockskip_pack.blockskip_core.data.timesteps import (
    SMALLEST_SIGMA,
    TIMESTEP_DISTRIBUTIONS,
    shift_sigma,
    sigma_sampler,
)
from blockskip_pack.blockskip_core.errors import InvalidInputError

COUNT = 20_000
CRITICAL = 1.95 / math.sqrt(COUNT)  # Kolmogorov-Smirnov, one in a thousand


def sample(distribution, *, model_sigma=lambda t: t, count=COUNT, seed=0, **settings):
    sampler = sigma_sampler(distribution, model_sigma=model_sigma, **settings)
    return sampler(count, torch.Generator().manual_seed(seed))


def distance_to(sigmas, cumulative):
    """Return the Kolmogorov-Smirnov distance to a cumulative distribution function."""
    values = cumulative(sigmas.double().sort().values)
    steps = torch.arange(1, len(sigmas) + 1, dtype=torch.float64) / len(sigmas)
    return (values - steps).abs().max().item()


@pytest.mark.parametrize("distribution", TIMESTEP_DISTRIBUTIONS)
def test_noise_levels_lie_in_range_and_follow_from_the_generator(distribution):
    sigmas = sample(distribution)
    assert sigmas.shape == (COUNT,)
    assert sigmas.dtype == torch.float32
    assert sigmas.min() >= SMALLEST_SIGMA
    assert sigmas.max() <= 1.0
    assert torch.equal(sigmas, sample(distribution))
    assert not torch.equal(sigmas, sample(distribution, seed=1))


def test_uniform_is_uniform():
    assert distance_to(sample("uniform"), lambda x: x) < CRITICAL + SMALLEST_SIGMA


def test_logit_normal_has_a_standard_normal_logit():
    assert distance_to(sample("logit-normal"), lambda x: torch.special.ndtr(torch.logit(x))) < CRITICAL


def test_shifted_is_the_shift_of_uniform():
    sigmas = sample("shifted", shift=3.0)
    unshift = sigmas.double() / (3.0 - 2.0 * sigmas.double())
    assert distance_to(unshift, lambda x: x) < CRITICAL + SMALLEST_SIGMA
    torch.testing.assert_close(sigmas, shift_sigma(sample("uniform"), 3.0), atol=3 * SMALLEST_SIGMA, rtol=1e-5)


def test_the_default_goes_through_the_models_own_map():
    sigmas = sample("model", model_sigma=lambda t: 0.2 + t * t / 2)
    assert sigmas.min() >= 0.2
    assert distance_to((sigmas - 0.2).clamp_min(0).mul(2).sqrt(), lambda x: x) < CRITICAL


def test_a_map_that_reaches_zero_is_kept_away_from_it():
    assert sample("model", model_sigma=lambda t: 0.0, count=3).tolist() == pytest.approx([SMALLEST_SIGMA] * 3)
    assert sample("model", model_sigma=lambda t: 7.0, count=3).tolist() == [1.0] * 3


def test_shift_of_one_changes_nothing_and_the_ends_stay():
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shift_sigma(sigmas, 1.0), sigmas)
    shifted = shift_sigma(sigmas, 3.0)
    assert shifted[0] == 0.0
    assert shifted[-1] == 1.0
    assert shifted[5].item() == pytest.approx(0.75, abs=1e-15)  # 1.5 / 2


def test_unknown_names_and_shifts_are_refused():
    with pytest.raises(InvalidInputError, match="must be one of model, uniform, logit-normal, shifted, got 'sigmoid'"):
        sigma_sampler("sigmoid", model_sigma=lambda t: t)
    for shift in (0.0, -1.0):
        with pytest.raises(InvalidInputError, match="shift must be positive"):
            sigma_sampler("shifted", model_sigma=lambda t: t, shift=shift)


@pytest.mark.parametrize("within", [(0.0, 0.3), (0.6, 0.875), (0.875, 1.0)])
def test_a_range_cuts_the_distribution_off(within):
    low, high = within
    sigmas = sigma_sampler("uniform", within=within)(20_000, torch.Generator().manual_seed(0))
    assert float(sigmas.min()) >= low
    assert float(sigmas.max()) <= high
    uniform = (sigmas - low) / (high - low)
    assert abs(float(uniform.mean()) - 0.5) < 0.01
    assert abs(float(uniform.var()) - 1 / 12) < 0.002


def test_the_whole_range_draws_what_it_always_drew():
    plain = sigma_sampler("logit-normal")(50, torch.Generator().manual_seed(3))
    assert torch.equal(sigma_sampler("logit-normal", within=(0.0, 1.0))(50, torch.Generator().manual_seed(3)), plain)


@pytest.mark.parametrize("within", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_ranges_that_are_none_are_refused(within):
    with pytest.raises(InvalidInputError, match="noise_from and noise_to must be a range within 0 to 1"):
        sigma_sampler("uniform", within=within)


def test_a_range_without_noise_levels_is_refused():
    almost_none = sigma_sampler("model", model_sigma=lambda time: 0.5, within=(0.6, 0.7))
    with pytest.raises(
        InvalidInputError, match="Hardly any noise level of the distribution 'model' is within 0.6 to 0.7"
    ):
        almost_none(2, torch.Generator().manual_seed(0))

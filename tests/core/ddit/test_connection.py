"""The residual connection: the best linear estimate, and only of what the tokens lack."""

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics, around_the_model
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing

RESIZING = PatchResizing(1, 2)


def statistics(numbers=8):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(numbers, numbers, dtype=torch.float64, generator=generator)
    variances, directions = torch.linalg.eigh(root @ root.T)
    return PatchStatistics(torch.randn(numbers, dtype=torch.float64, generator=generator), directions, variances)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_it_is_the_conditional_mean_of_a_gaussian(sigma):
    known = statistics()
    covariance = known.directions @ known.variances.diag() @ known.directions.T
    patches = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(8)
    gain = (1 - sigma) * covariance @ torch.linalg.inv(seen)
    expected = known.mean + (patches - (1 - sigma) * known.mean) @ gain.T
    level = torch.full((2,), sigma, dtype=torch.float64)
    torch.testing.assert_close(known.clean(patches, level), expected)


def test_without_noise_it_is_the_latent_and_with_noise_only_it_is_the_mean():
    known, patches = statistics(), torch.randn(2, 5, 8, dtype=torch.float64)
    levels = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = known.clean(patches, levels)
    torch.testing.assert_close(found[0], patches[0])
    torch.testing.assert_close(found[1], known.mean.expand(5, 8))


def test_nothing_is_added_to_what_the_tokens_carry():
    x = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    added = around_the_model(x, torch.tensor([0.3, 0.6], dtype=torch.float64), statistics(), RESIZING)
    assert added.abs().max() > 0.01
    torch.testing.assert_close(RESIZING.reduced(added), torch.zeros(2, 2, 3, 4, dtype=torch.float64))


def test_statistics_are_those_of_the_patches():
    x = torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(3)) * 2.0 + 1.0
    found = PatchStatistics.of(x, RESIZING)
    patches = RESIZING.tokens(x.double()).flatten(0, 1)
    covariance = torch.cov(patches.T, correction=0)
    shrunk = 0.98 * covariance + 0.02 * covariance.diagonal().mean() * torch.eye(8)
    rebuilt = found.directions @ found.variances.diag() @ found.directions.T
    torch.testing.assert_close(rebuilt.double(), shrunk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean.double(), patches.mean(0), rtol=1e-6, atol=1e-6)

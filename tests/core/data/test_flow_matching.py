"""The velocity loss."""

import torch
from blockskip_pack.blockskip_core.data.flow_matching import velocity_loss


def test_the_velocity_error_is_that_of_the_explicit_velocities():
    generator = torch.Generator().manual_seed(0)
    clean, noise, denoised = (torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    sigmas = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    weight = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - weight) * clean + weight * noise
    velocity = (noisy - denoised) / weight
    expected = (velocity - (noise - clean)).square().flatten(1).mean(1)
    torch.testing.assert_close(velocity_loss(denoised, clean, sigmas), expected, atol=1e-12, rtol=0.0)

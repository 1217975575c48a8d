"""Pictures as latents of one size."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError

from ..tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")


class MeanVae:
    """A VAE of 8 pixels per cell: their mean colour, and the mean of all."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([cells, cells.mean(1, keepdim=True)], 1)


@pytest.fixture
def module(comfyui):
    from blockskip_pack.blockskip_core.hosts.words import latents

    return latents


def test_the_middle_square_is_used_and_mirrored_ones_follow(module):
    picture = torch.zeros(32, 64, 3)
    picture[:, 16:32, 0] = 1.0  # the left half of the middle square
    squares = module.Middles([picture, 1.0 - picture], 32, 32, True)
    assert len(squares) == 4
    assert torch.equal(squares[0], picture[:, 16:48])
    assert torch.equal(squares[2], picture[:, 16:48].flip(1))
    assert torch.equal(squares[3], squares[1].flip(1))


def test_latents_are_in_the_models_scale_once(module):
    model = tiny_flux().model
    seen = []
    pictures = [torch.rand(40, 64, 3), torch.rand(16, 16, 3)]
    found = module.square_latents(MeanVae(), model, pictures, 32, False, lambda *done: seen.append(done))
    expected = MeanVae().encode(module.Middles(pictures, 32, 32)[1][None])
    assert found.shape == (2, 4, 4, 4)
    torch.testing.assert_close(found[1:], model.process_latent_in(expected))
    assert seen == [(1, 2), (2, 2)]


def test_a_side_that_the_vae_cannot_encode_is_refused(module):
    with pytest.raises(InvalidInputError, match="resolution must be a multiple of 16 px"):
        module.square_latents(MeanVae(), tiny_flux().model, [torch.rand(16, 16, 3)], 40, False, lambda *done: None)

"""Examples of several shapes in one run, on tiny models of ComfyUI's own classes: rectangles, and pictures beside clips."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.data.latents import largest_shape
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ..followed_families import family
from ..tiny_families import FAMILIES, FLUX, PLAN, MemorySource, replayed, selection, train
from ..tiny_minimax import MINIMAX

CLIPS = {"flux": 1, "minimax": 7}  # latent frames of a clip; of the others three
TINY = [FLUX, *(one for one in FAMILIES if one.name == "wan21"), family("ltx2"), MINIMAX]
pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture(params=TINY, ids=lambda tiny: tiny.name, scope="module")
def tiny(request):
    return request.param


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def clean(tiny):
    """A clip, a picture of its size, a picture of another size, and a clip of that size."""
    channels, rows, columns = tiny.latent_shape
    frames, generator = CLIPS.get(tiny.name, 3), torch.Generator().manual_seed(5)
    shapes = [(frames * channels, rows, columns), (channels, rows, columns), (channels, rows + 2, columns - 2)]
    shapes.append((frames * channels, rows + 2, columns - 2))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(scope="module")
def dit(patcher, tiny, clean):
    return replace(tiny, latent_shape=largest_shape(clean)).hosted(patcher)


def whole(dit, clean, draw):
    noisy, _, sigmas = noisy_batch(PLAN, clean, [draw])
    with torch.no_grad(), dit.running({}) as denoise:
        return denoise(noisy, sigmas, [PLAN[draw].caption])


def test_every_example_passes_the_model_as_in_a_run_of_its_own_shape(tiny, patcher, dit, clean):
    for draw, latent in enumerate(clean):
        own = replace(tiny, latent_shape=tuple(latent.shape)).hosted(patcher)
        assert torch.equal(whole(dit, clean, draw), whole(own, clean, draw))


def test_texts_are_kept_once(dit, clean):
    shape = tuple(clean[1].shape)
    for caption, own in enumerate(dit.arguments):
        assert dit.arguments_of(caption, shape)["c_crossattn"] is own["c_crossattn"]


def test_skipping_with_stored_residuals_is_the_whole_model(dit, clean):
    spans = selection(1, 1, len(dit.blocks))
    computed = precompute_residuals(dit, PLAN, clean, spans, range(4))
    for draw, latent in enumerate(clean):
        skipping = replayed(dit, spans, computed.residuals, clean, [draw])
        torch.testing.assert_close(skipping, whole(dit, clean, draw), atol=1e-5, rtol=0.0)
        channels, rows, columns = latent.shape
        assert computed.residuals[draw].front.img.shape[1] == dit.image_tokens(rows, columns, channels)


def test_training_lowers_the_loss(tiny, dit, clean):
    spans = selection(1, 1, len(dit.blocks))
    rows = 1 if tiny is MINIMAX else 4
    result, gradients = train(
        dit, spans, MemorySource(dit, spans, PLAN, clean), tiny.lora(dit, spans), plan=PLAN, clean=clean, steps=12,
        batch_size=rows, accumulation=4 // rows,
    )  # fmt: skip
    assert sum(result.losses[-4:]) < 0.99 * sum(result.losses[:4])
    assert result.self_check < 1e-5
    assert all(gradient.any() for gradient in gradients.values())

"""Clips of several frames on tiny random video models of ComfyUI's own classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ..followed_families import family
from ..tiny_families import FAMILIES, PLAN, TinyFamily, replayed, selection

FRAMES = 3
pytestmark = pytest.mark.usefixtures("comfyui")


def clips_of(tiny: TinyFamily) -> TinyFamily:
    """The family with latents of several frames."""
    channels, rows, columns = tiny.latent_shape
    return replace(tiny, latent_shape=(FRAMES * channels, rows, columns))


VIDEO = [one for one in FAMILIES if one.name in ("wan21", "wan22")] + [
    family(n) for n in ("hunyuan_video", "hunyuan_video15", "kandinsky5_video", "ltxv", "ltx2")
]


@pytest.fixture(params=VIDEO, ids=lambda tiny: tiny.name, scope="module")
def tiny(request):
    return clips_of(request.param)


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def dit(patcher, tiny):
    return tiny.hosted(patcher)


def as_sampled(tiny, dit, noisy, sigma, caption):
    """ComfyUI's own call with a video latent (1, C, F, H, W)."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([dit.patcher])
    channels = tiny.latent_shape[0] // FRAMES
    video = noisy.view(1, channels, FRAMES, *noisy.shape[-2:])
    with torch.inference_mode():
        denoised = dit.patcher.model.apply_model(video, sigma, transformer_options={}, **dit.arguments[caption]).clone()
    return denoised.reshape(noisy.shape)


def test_the_model_sees_a_video(tiny, dit):
    noisy, sigma = tiny.clean_latents(1), torch.tensor([0.4])
    with torch.no_grad(), dit.running({}) as denoise:
        got = denoise(noisy, sigma, [0])
    torch.testing.assert_close(got, as_sampled(tiny, dit, noisy, sigma, 0), atol=2e-5, rtol=0.0)
    alone = noisy.clone()
    alone.view(-1, FRAMES, *noisy.shape[-2:])[:, 1:] = 0.0
    with torch.no_grad(), dit.running({}) as denoise:
        changed = denoise(alone, sigma, [0])
    first = slice(None, None, FRAMES)  # channels of the first frame
    assert not torch.allclose(changed[:, first], got[:, first], atol=1e-4)  # frames attend to each other


def test_skipping_with_stored_residuals_is_the_whole_model(tiny, dit):
    clean, count = tiny.clean_latents(), len(dit.blocks)
    for front, back in ((1, 0), (0, 1), (1, 1)):
        spans = selection(front, back, count)
        computed = precompute_residuals(dit, PLAN, clean, spans, [0])
        skipping = replayed(dit, spans, computed.residuals, clean, [0])
        torch.testing.assert_close(skipping, computed.reference.denoised, atol=1e-5 if back else 0.0, rtol=0.0)
    stored = computed.residuals[0]
    assert stored.front.img.shape[1] == dit.image_tokens(*tiny.latent_shape[1:]) == FRAMES * tiny.num_img


def test_training_lowers_the_loss(tiny, patcher, dit):
    result, gradients, _ = tiny.run(
        patcher, selection(1, 1, len(dit.blocks)), steps=10, batch_size=2, learning_rate=1e-2
    )
    assert result.losses[-1] < 0.98 * result.losses[0]
    assert result.self_check < 1e-5
    assert all(gradient.any() for gradient in gradients.values())


def test_a_run_on_clips_can_be_counted(tiny, dit):
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    twin = WeightlessDit.of(dit)
    assert twin.image_tokens(*tiny.latent_shape[1:]) == dit.image_tokens(*tiny.latent_shape[1:])
    with torch.no_grad(), twin.running({}) as denoise:
        output = denoise(torch.empty(1, *tiny.latent_shape, device="meta"), torch.empty(1, device="meta"), [0])
    assert output.shape == (1, *tiny.latent_shape)

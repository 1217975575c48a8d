"""A coarse call: exact on models whose answer is known, and unchanged by a new adapter."""

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter, coarse_estimate
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.errors import InvalidInputError

WIDTH = 6
each_kind = pytest.mark.parametrize("kind", ["nearest", "bilinear"])


def tensors():
    generator = torch.Generator().manual_seed(5)
    clean, noise = torch.randn(2, 2, 3, 8, 12, dtype=torch.float64, generator=generator).unbind(0)
    return clean, noise, torch.tensor([0.3, 0.8], dtype=torch.float64)


def noisy(clean, noise, sigma):
    level = sigma[:, None, None, None]
    return (1 - level) * clean + level * noise


def test_an_exact_model_of_the_reduced_picture_gives_what_the_tokens_carry():
    clean, noise, sigma = tensors()
    resizing = PatchResizing(1, 2)
    seen = {}

    def call(latent, level, added):
        assert added is None
        seen["latent"], seen["level"] = latent, level
        return resizing.reduced(clean), torch.zeros(2, 24, WIDTH)

    found = coarse_estimate(noisy(clean, noise, sigma), sigma, CoarseAdapter(resizing), call)
    torch.testing.assert_close(found, resizing.carried(clean))
    unit = resizing.reduced(noise) / resizing.noise_share
    torch.testing.assert_close(seen["latent"], noisy(resizing.reduced(clean), unit, seen["level"]))


@each_kind
def test_a_new_adapter_changes_nothing(kind):
    clean, noise, sigma = tensors()
    resizing = PatchResizing(2, 2, kind)
    statistics = PatchStatistics.of(clean, resizing)

    def call(latent, level, added):
        assert added is None or not added.any()
        return latent * 0.5, torch.ones(2, 6, WIDTH)

    plain, new = (
        coarse_estimate(noisy(clean, noise, sigma), sigma, CoarseAdapter(resizing, statistics, adapter), call)
        for adapter in (None, PatchAdapter(3 * 16, WIDTH))
    )
    assert torch.equal(plain, new)


def test_a_clip_is_its_frames_if_the_model_treats_them_alone():
    clean, noise, sigma = tensors()
    clips = [torch.stack((x, x.flip(-1), 2.0 * x), 2).flatten(1, 2) for x in (clean, noise)]
    resizing, generator = PatchResizing(1, 2), torch.Generator().manual_seed(0)
    adapter = PatchAdapter(3 * 4, WIDTH)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += torch.randn(tensor.shape, generator=generator) * 0.1
    coarse = CoarseAdapter(resizing, PatchStatistics.of(clean, resizing), adapter)

    def call(latent, level, added):
        return latent * 0.5, torch.tanh(added)

    x = noisy(*clips, sigma)
    found = coarse_estimate(x, sigma, coarse.of_clips(3), call).unflatten(1, (3, 3))
    for number, frame in enumerate(x.unflatten(1, (3, 3)).unbind(2)):
        torch.testing.assert_close(found[:, :, number], coarse_estimate(frame, sigma, coarse, call))


def test_every_tensor_gets_a_gradient_after_one_step():
    """The layers behind the zeros get theirs as soon as those have moved."""
    clean, noise, sigma = tensors()
    adapter = PatchAdapter(3 * 4, WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += torch.randn(tensor.shape, generator=generator) * 0.1

    def call(latent, level, added):
        leaving = torch.ones(2, 24, WIDTH, dtype=torch.float64) + added
        return latent, leaving

    found = coarse_estimate(noisy(clean, noise, sigma), sigma, CoarseAdapter(PatchResizing(1, 2), None, adapter), call)
    found.square().mean().backward()
    assert {
        name for name, tensor in adapter.named_parameters() if tensor.grad is None or not tensor.grad.any()
    } == set()


def test_the_added_velocity_is_subtracted_times_the_noise_level():
    clean, noise, sigma = tensors()
    resizing, adapter = PatchResizing(1, 2), PatchAdapter(3 * 4, WIDTH)
    with torch.no_grad():
        adapter.bias += 2.0

    def call(latent, level, added):
        return torch.zeros_like(latent), torch.zeros(2, 24, WIDTH)

    found = coarse_estimate(noisy(clean, noise, sigma), sigma, CoarseAdapter(resizing, None, adapter), call)
    torch.testing.assert_close(found, -2.0 * sigma[:, None, None, None].expand_as(found))


def test_a_latent_that_is_not_cut_evenly_is_refused():
    with pytest.raises(InvalidInputError, match="multiples of 4, got 6 x 8"):
        coarse_estimate(torch.zeros(1, 3, 6, 8), torch.ones(1), CoarseAdapter(PatchResizing(2, 2)), lambda *_: None)


def test_trained_tensors_are_copied_only_to_another_device():
    resizing = PatchResizing(2, 2)
    statistics = PatchStatistics.of(torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)), resizing)
    adapter = CoarseAdapter(resizing, statistics, PatchAdapter(2 * resizing.side**2, WIDTH))
    assert adapter.on(torch.device("cpu")).patches is adapter.patches
    assert adapter.on(torch.device("cpu", 0)).patches is adapter.patches
    moved = adapter.on(torch.device("meta"))
    assert moved.patches is not adapter.patches
    assert {tensor.device.type for tensor in (*moved.patches.parameters(), *vars(moved.statistics).values())} == {
        "meta"
    }
    kept = adapter.with_statistics_on(torch.device("meta"))
    assert kept.patches is adapter.patches
    assert {tensor.device.type for tensor in vars(kept.statistics).values()} == {"meta"}

"""Samples during training: the same that ComfyUI would sample with the LoRA applied."""

from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from blockskip_pack.blockskip_core.adapters.lora_formats import to_host_lora
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.selection import BlockSelection

from ..tiny_families import FAMILIES
from ..tiny_flux import assert_same_weights, captions, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

SELECTION = BlockSelection(front=2, back=1, num_blocks=6, family="flux")


class Recorder:
    """A VAE that records its input and shows three of its channels."""

    def decode(self, latent):
        self.latent = latent.clone()
        return latent[:, :3].movedim(1, -1)


@pytest.fixture
def module(comfyui):
    from blockskip_pack.blockskip_core.hosts.sampling import training_samples

    return training_samples


def lora_for(patcher, seed=None, selection=SELECTION):
    """A LoRA on all linear layers of the kept blocks; with a seed, one whose weights are not zero."""
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    layers = HostedDit(patcher).lora_layers(selection, "attention and mlp")
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    adapters = LoraAdapters(shapes, LoraSettings(rank=4, alpha=4, targets="attention and mlp"), seed=0)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in adapters.names:
                adapters.up(name).normal_(0.0, 0.2, generator=generator)
    return adapters


def sampled(module, patcher, adapters, **changes):
    """The latent that was decoded, and the pictures."""
    vae, on_step = Recorder(), changes.pop("on_step", lambda *_: None)
    settings = {"width": 96, "height": 64, "steps": 3, "every": 1, "seed": 5, **changes}
    positive = settings.pop("positive", captions((5,)))
    request = module.sample_request(positive, settings.pop("negative", None), vae=vae, **settings)
    sampler = module.TrainingSampler(patcher, request, SELECTION)
    pictures = sampler.pictures(adapters, training_peak=0, on_step=on_step)
    return SimpleNamespace(latent=getattr(vae, "latent", None), pictures=pictures)


def host_samples(patcher, *, cfg=1.0, negative=None, seed=5, scheduler="simple"):
    """The same picture from ComfyUI's own sampler."""
    import comfy.sample

    empty = torch.zeros(1, 4, 8, 12)
    positive = captions((5,))[0]
    noise = comfy.sample.prepare_noise(empty, seed)
    return comfy.sample.sample(
        patcher, noise, 3, cfg, "euler", scheduler, positive, negative or positive, empty, disable_pbar=True, seed=seed
    )


@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta"])
def test_with_nothing_learned_it_is_the_host_s_picture(module, scheduler):
    patcher = tiny_flux()
    ours = sampled(module, patcher, lora_for(patcher), scheduler=scheduler).latent
    torch.testing.assert_close(ours, host_samples(patcher, scheduler=scheduler), rtol=1e-5, atol=1e-5)


def test_with_guidance_too(module):
    patcher, negative = tiny_flux(), captions((3,), seed=9)
    ours = sampled(module, patcher, lora_for(patcher), cfg=3.5, negative=negative).latent
    expected = host_samples(patcher, cfg=3.5, negative=negative[0])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, host_samples(patcher), atol=1e-3)


def test_what_was_learned_is_in_the_picture_as_with_the_lora_loaded(module):
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    patcher = tiny_flux()
    adapters = lora_for(patcher, seed=2)
    ours = sampled(module, patcher, adapters).latent
    loaded = apply_lora(patcher, to_host_lora(adapters.state_dict(), adapters.scale), 1.0).model
    torch.testing.assert_close(ours, host_samples(loaded), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, host_samples(patcher), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "cfg"),
    [pytest.param(family, (1.0, 3.0)[place % 2], id=family.name) for place, family in enumerate(FAMILIES)],
)
def test_every_family_is_sampled_as_by_the_host(module, family, cfg):
    import comfy.sample
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    patcher = family.build()
    selection = BlockSelection(front=1, back=1, num_blocks=family.num_blocks, family=family.family)
    adapters = lora_for(patcher, seed=1, selection=selection)
    prompts, negative, vae = family.captions((5, 3)), family.captions((4,), seed=7), Recorder()
    request = module.sample_request(prompts, negative, vae=vae, every=1, width=96, height=64, steps=2, cfg=cfg, seed=5)
    loaded = apply_lora(patcher, to_host_lora(adapters.state_dict(), adapters.scale), 1.0).model
    form = patcher.model.latent_format
    cells = [side // form.spacial_downscale_ratio for side in (64, 96)]
    empty = torch.zeros(1, form.latent_channels, *([1] if family.frames else []), *cells)
    with torch.inference_mode():  # as nodes run
        sampler = module.TrainingSampler(patcher, request, selection)
        sampler.pictures(adapters, training_peak=0, on_step=lambda *_: None)
        expected = comfy.sample.sample(
            loaded, comfy.sample.prepare_noise(empty, 5), 2, cfg, "euler", "simple", prompts[1], negative[0], empty,
            disable_pbar=True, seed=5,
        )  # fmt: skip
    assert (vae.latent - expected).norm() < 1e-3 * expected.norm()


def test_a_size_between_two_patches_is_refused(module, monkeypatch):
    patcher = tiny_flux()
    monkeypatch.setattr(patcher.model.latent_format, "spacial_downscale_ratio", 16)
    with pytest.raises(
        InvalidInputError, match="width and height must be multiples of 32 px for this model, got 48 and 64"
    ):
        sampled(module, patcher, lora_for(patcher), width=48)


def test_others_make_room_before_it_is_looked_how_much_there_is(module, monkeypatch):
    patcher, calls = tiny_flux(), []
    evict, look = module.evict_others, module.TrainingSampler._to_keep_free
    monkeypatch.setattr(module, "evict_others", lambda p: calls.append("evicted") or evict(p))
    monkeypatch.setattr(
        module.TrainingSampler, "_to_keep_free", lambda self, peak: calls.append("looked") or look(self, peak)
    )
    sampled(module, patcher, lora_for(patcher))
    assert calls[:2] == ["evicted", "looked"]


def test_no_generator_of_any_device_is_seeded(module, monkeypatch):
    patcher = tiny_flux()
    adapters = lora_for(patcher)

    def refuse(seed):
        raise AssertionError("torch.manual_seed seeds every device's generator")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    sampled(module, patcher, adapters)


def test_model_and_random_numbers_are_as_before(module):
    import comfy.model_management

    patcher = tiny_flux()
    before, numbers = weights(patcher), torch.random.get_rng_state()
    adapters = lora_for(patcher, seed=1)
    sampled(module, patcher, adapters)
    assert_same_weights(patcher, before)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert not comfy.model_management.in_training
    assert not patcher.object_patches_backup
    assert all(parameter.grad is None for parameter in adapters.parameters())


def test_an_interrupt_leaves_everything_as_it_was(module):
    patcher = tiny_flux()
    before, steps = weights(patcher), []

    def stop(done, total):
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(module, patcher, lora_for(patcher), on_step=stop)
    assert steps == [(1, 3), (2, 3)]
    assert_same_weights(patcher, before)
    assert not patcher.object_patches_backup


def test_every_prompt_gets_a_picture_from_the_same_noise(module):
    patcher = tiny_flux()
    first, second = captions((5, 7))
    both = sampled(module, patcher, lora_for(patcher), positive=[first, second]).pictures
    alone = [sampled(module, patcher, lora_for(patcher), positive=[one]).pictures[0] for one in (first, second)]
    assert [picture.shape for picture in both] == [(8, 12, 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert not torch.equal(*both)


def test_weights_may_take_what_training_took_and_the_budget(module, monkeypatch):
    patcher = tiny_flux()
    request = module.sample_request(captions((5,)), None, vae=Recorder(), every=1, budget_bytes=1000.0)
    sampler = module.TrainingSampler(patcher, request, SELECTION)
    monkeypatch.setattr(module.comfy.model_management, "get_free_memory", lambda device: 10_000_000)
    monkeypatch.setattr(patcher.model, "memory_required", lambda shape, cond_shapes: 300)
    assert sampler._to_keep_free(2000) == 10_000_000 - (2000 + 1000 - 300)
    assert sampler._to_keep_free(0) == 10_000_000 - 700
    assert sampler._to_keep_free(20_000_000) == 300  # all weights, and memory for sampling


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"width": 100}, "width must be a multiple of 16 from 16 to 4096 px, got 100"),
        ({"height": 8192}, "height must be a multiple of 16 from 16 to 4096 px, got 8192"),
        ({"cfg": 0.5}, "cfg must be between 1 and 100, got 0.5"),
        ({"cfg": float("nan")}, "cfg must be between 1 and 100, got nan"),
        ({"cfg": 2.0}, "cfg above 1 needs a `negative`"),
        ({"budget_bytes": -1.0}, "memory_budget must not be negative"),
        ({"scheduler": "best"}, "scheduler must be one of .*, got 'best'"),
        ({"positive": []}, "No conditioning came in"),
        ({"positive": captions((5,)) * 17}, "At most 16 prompts are sampled, got 17"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused(module, changes, match):
    patcher = tiny_flux()
    with pytest.raises(InvalidInputError, match=match):
        sampled(module, patcher, lora_for(patcher), **changes)


def test_it_is_due_every_so_often_at_the_start_and_at_the_end(module):
    request = module.sample_request(captions((5,)), None, vae=Recorder(), every=4)
    assert [step for step in range(12) if request.is_due(step, 11)] == [0, 4, 8, 11]
    late = module.sample_request(captions((5,)), None, vae=Recorder(), every=4, at_start=False)
    assert not late.is_due(0, 11)

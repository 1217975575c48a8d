"""Whole tiny pipelines: the texts, latents and calls of a training are those of the pipeline, and it reads the LoRA."""

from __future__ import annotations

import diffusers
import pytest
import torch
from blockskip_pack import blockskip_core as blockskip
from blockskip_pack.blockskip_core.data.timesteps import shift_sigma
from blockskip_pack.blockskip_core.errors import UnsupportedModelError
from blockskip_pack.blockskip_core.hosts import diffusers as host

from .tiny_models import FAMILIES
from .tiny_pipelines import PIPELINES, build

TEXTS = ["a photo of sks dog", "a cat"]
SIDES = {"flux": 64, "flux2": 16, "qwen_image": 16, "lumina2": 16, "wan": 32, "sana": 64}  # pixels: a few tokens
WITHOUT_GUIDANCE = {
    "flux": {}, "flux2": {"guidance_scale": 1.0}, "qwen_image": {"true_cfg_scale": 1.0},
    "lumina2": {"guidance_scale": 0.0}, "wan": {"guidance_scale": 1.0, "num_frames": 1},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
}  # fmt: skip


@pytest.fixture(params=PIPELINES, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(name):
    return build(name)


@pytest.fixture(scope="module")
def captions(pipeline):
    return host.encode_captions(pipeline, TEXTS)


def tiny_of(name):
    return next(tiny for tiny in FAMILIES if tiny.name == name)


def as_given(name, pipeline, latents):
    """Latents (1, C, H, W) in the form in which the pipeline is given them, by its own functions."""
    if name in ("flux", "qwen_image"):
        return pipeline._pack_latents(latents, *latents.shape)
    return latents[:, :, None] if name == "wan" else latents


def as_returned(name, pipeline, latents):
    """Latents (1, C, H, W) in the form in which the pipeline returns them."""
    if name != "flux2":
        return as_given(name, pipeline, latents)
    bn = pipeline.vae.bn
    deviation = torch.sqrt(bn.running_var + pipeline.vae.config.batch_norm_eps)
    return pipeline._unpatchify_latents(latents * deviation.view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1))


def made(name, pipeline, latents, output_type):
    """What the pipeline makes of these latents in one step, without guidance."""
    side = SIDES[name]
    result = pipeline(
        prompt=TEXTS[0], height=side, width=side, num_inference_steps=1, latents=as_given(name, pipeline, latents),
        output_type=output_type, **WITHOUT_GUIDANCE[name],
    )  # fmt: skip
    return result.frames if name == "wan" else result.images


def cells(name, pipeline):
    """The number of latent cells on a side of the picture."""
    return SIDES[name] // host.crop_multiple(pipeline) * tiny_of(name).latent_shape[1] // 3


def noise(name, pipeline):
    side = cells(name, pipeline)
    return torch.randn(1, tiny_of(name).latent_shape[0], side, side, generator=torch.Generator().manual_seed(4))


def test_one_step_of_the_pipeline_is_our_clean_estimate(name, pipeline, captions):
    """Texts, packing, positions, time and sign of the velocity are those with which the pipeline makes pictures."""
    dit, latents = host.DiffusersDit(pipeline.transformer, captions), noise(name, pipeline)
    pictured = made(name, pipeline, latents, "latent")
    sigma = torch.tensor([float(pipeline.scheduler.sigmas[0])])
    with torch.no_grad(), dit.running({}) as denoise:
        ours = denoise(latents, sigma, [0])
        other = denoise(latents, sigma, [1])
    torch.testing.assert_close(as_returned(name, pipeline, ours).flatten(), pictured.flatten(), atol=5e-6, rtol=1e-5)
    assert not torch.allclose(ours, other)


def test_the_pipeline_decodes_our_latents_to_the_picture_that_its_vae_makes(name, pipeline):
    """With a head that computes nothing, the pipeline decodes the latents that it is given."""
    multiple, side = host.crop_multiple(pipeline), SIDES[name]
    picture = torch.rand(side, side, 3, generator=torch.Generator().manual_seed(1))
    schedule = blockskip.draw_schedule(
        [(side, side)], num_captions=1, num_draws=1, seed=0, sample_sigmas=blockskip.sigma_sampler("uniform"),
        patches=blockskip.PatchConfig(patch_min=side, patch_max=side, multiple=multiple),
    )  # fmt: skip
    examples = host.encode_examples(pipeline, [picture], schedule)
    assert examples.latents.shape[1:] == noise(name, pipeline).shape[1:]
    pixels = 2 * picture.permute(2, 0, 1)[None] - 1
    with torch.no_grad():
        pixels = pixels[:, :, None] if name in ("qwen_image", "wan") else pixels
        encoded = pipeline.vae.encode(pixels)
        latent = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        expected = pipeline.vae.decode(latent, return_dict=False)[0].flatten()
    head = pipeline.transformer.get_submodule("all_final_layer.2-1.linear" if name == "lumina2" else "proj_out")
    before = {key: value.clone() for key, value in head.state_dict().items()}
    try:
        head.load_state_dict({key: torch.zeros_like(value) for key, value in before.items()})
        picture_again = made(name, pipeline, examples.latents, "pt").flatten()
    finally:
        head.load_state_dict(before)
    torch.testing.assert_close(picture_again, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0.0)


def trained(name, pipeline, captions, *, rank=4):
    dit, side = host.DiffusersDit(pipeline.transformer, captions), SIDES[name]
    schedule = blockskip.draw_schedule(
        [(side, side)] * 2, num_captions=2, num_draws=2, seed=0,
        patches=blockskip.PatchConfig(patch_min=side, patch_max=side, multiple=host.crop_multiple(pipeline)),
        sample_sigmas=blockskip.sigma_sampler("shifted", shift=host.noise_shift(pipeline, side)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    pictures = [torch.rand(side, side, 3, generator=generator) for _ in range(2)]
    examples, selection = host.encode_examples(pipeline, pictures, schedule), blockskip.select(dit, 0.5)
    config = blockskip.TrainingConfig(steps=2, learning_rate=1e-2)
    settings = blockskip.LoraSettings(rank=rank, alpha=3.0 * rank)  # a scale of 3, which must not get lost
    lora = blockskip.train(dit, examples, selection, config, lora=settings, layers=dit.lora_layers(selection))
    return dit, lora


@pytest.mark.parametrize("rank", [4, 40])
def test_the_pipeline_reads_the_lora(name, pipeline, captions, tmp_path, rank):
    """Through ``load_lora_weights`` of the whole pipeline; rank 40 is more than some layers can have."""
    if rank == 40 and name != "flux":
        pytest.skip("the file's form is the same for all")
    dit, lora = trained(name, pipeline, captions, rank=rank)
    assert bool(lora.adapters.narrow_layers) == (rank == 40)
    host.save_lora(lora, tmp_path / "lora.safetensors")
    latents, sigma = noise(name, pipeline), torch.tensor([0.7])
    with blockskip.apply(dit, lora) as denoise:
        expected = denoise(latents, sigma, [0])
    plain = estimate(dit, pipeline, latents, sigma)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    try:
        loaded = estimate(dit, pipeline, latents, sigma)
    finally:
        pipeline.unload_lora_weights()
    changed = (loaded - plain).norm()
    assert changed > 1e-4 * plain.norm()
    assert (loaded - expected).norm() < 1e-3 * changed
    assert torch.equal(estimate(dit, pipeline, latents, sigma), plain)


@torch.no_grad()
def estimate(dit, pipeline, latents, sigma):
    """The clean estimate of the pipeline's transformer as it is now."""
    velocity = dit.layout.velocity(pipeline.transformer, latents, sigma, dit._joined([0]))
    return latents - sigma.view(-1, 1, 1, 1) * velocity


def test_the_encoders_are_moved_for_the_time_of_encoding():
    pipeline, seen = build("wan"), []
    pipeline.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(module.dtype))
    home = next(pipeline.text_encoder.parameters()).device
    host.encode_captions(pipeline, TEXTS, device="cpu")
    assert len(seen) == len(TEXTS)
    assert next(pipeline.text_encoder.parameters()).device == home
    before = pipeline.text_encoder.to
    moves = []
    pipeline.text_encoder.to = lambda place: moves.append(str(place)) or before(place)
    with pytest.raises(AttributeError):  # of the pipeline, which is not given a text
        host.encode_captions(pipeline, [None], device="cpu")
    assert moves == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("family", "smallest", "largest", "multiple"), [("flux", 256, 512, 32), ("sana", 512, 1024, 32)]
)
def test_the_papers_crops(family, smallest, largest, multiple):
    patches = host.paper_patches(build(family))
    assert (patches.patch_min, patches.patch_max, patches.multiple) == (smallest, largest, multiple)


TIMES = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("family", PIPELINES)
def test_noise_levels_are_shifted_as_by_the_scheduler(family):
    """The scheduler's own noise levels are our shift of evenly spaced ones."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    pipeline = build(family)
    tokens = (256 // host.crop_multiple(pipeline)) ** 2
    mu = compute_empirical_mu(tokens, 50) if family == "flux2" else calculate_shift(tokens)
    dynamic = pipeline.scheduler.config.use_dynamic_shifting
    pipeline.scheduler.set_timesteps(sigmas=TIMES, **({"mu": mu} if dynamic else {}))
    shifted = shift_sigma(torch.tensor(TIMES), host.noise_shift(pipeline, 256))
    torch.testing.assert_close(shifted, pipeline.scheduler.sigmas[:4], atol=1e-6, rtol=0.0)
    assert dynamic == (family in ("flux", "flux2", "qwen_image"))


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_other_schedulers_say_their_shift_too(scheduler):
    pipeline = build("sana")
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.5}
    pipeline.scheduler = getattr(diffusers, scheduler)(**settings)
    assert host.noise_shift(pipeline, 512) == 4.5


def test_a_pipeline_of_another_kind_is_refused():
    class KolorsPipeline:
        pass

    with pytest.raises(UnsupportedModelError, match="Expected one of diffusers' pipelines FluxPipeline, .* KolorsPipe"):
        host.encode_captions(KolorsPipeline(), TEXTS)

"""MiniMax H3, which denoises video and sound together, one example at a time, as a tiny random model of ComfyUI's class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ..tiny_families import PLAN, TinyFamily, replayed, selection
from ..tiny_flux import assert_same_weights, weights
from ..tiny_minimax import MINIMAX, MINIMAX_CURVES
from .test_followed import along_a_direction

CLIP_FRAMES = 7  # latent frames of 22 pictures
CLIP = replace(MINIMAX, name="clip", latent_shape=(CLIP_FRAMES * 24, 6, 10))
SIDES = ((4, 6), (8, 4))  # rows and columns of reference pictures in latent cells


def _references(generator: torch.Generator) -> dict:
    return {"reference_latents": [torch.randn(1, 24, 1, *side, generator=generator) for side in SIDES]}


REFERENCES = replace(CLIP, name="references", settings=_references)
REFERENCE_TOKENS = {"references": 2 * 3 + 4 * 2}
SOUND = {"minimax": 2, "curves": 2, "clip": 37, "references": 37}  # sound latents: 40 a second, 24 pictures a second
pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture(params=[MINIMAX, MINIMAX_CURVES, CLIP, REFERENCES], ids=lambda tiny: tiny.name, scope="module")
def tiny(request) -> TinyFamily:
    return request.param


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


@pytest.fixture(scope="module")
def dit(patcher, tiny):
    return tiny.hosted(patcher)


def as_sampled(tiny, dit, noisy, sigma, caption):
    """ComfyUI's own call with a video and a silent sound, noised as its sampler would noise it."""
    import comfy.model_management
    import comfy.utils

    comfy.model_management.load_models_gpu([dit.patcher])
    video = noisy.view(1, 24, -1, *noisy.shape[-2:])
    sound = dit.adapter.sound(dit.frames, sigma)
    assert sound.shape == (1, 32, 2, SOUND[tiny.name])
    packed, shapes = comfy.utils.pack_latents([video, sound])
    with torch.inference_mode():
        denoised = dit.patcher.model.apply_model(packed, sigma, transformer_options={}, **dit.arguments[caption])
        return comfy.utils.unpack_latents(denoised.clone(), shapes)[0].reshape(noisy.shape)


def test_the_model_is_called_as_when_sampling(tiny, dit):
    noisy, sigma = tiny.clean_latents(1), torch.tensor([0.4])
    with torch.no_grad(), dit.running({}) as denoise:
        got = denoise(noisy, sigma, [0])
    torch.testing.assert_close(got, as_sampled(tiny, dit, noisy, sigma, 0), atol=2e-5, rtol=0.0)


def test_references_reach_the_model_as_from_the_hosts_own_node(comfyui):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    patcher = REFERENCES.build()
    (caption,) = REFERENCES.captions((5,))
    dit = HostedDit(patcher, [caption], REFERENCES.latent_shape)
    [[_, settings]] = caption
    blocks = [
        {"kind": "image", "latent_h": rows, "latent_w": columns, "latent": latent}
        for (rows, columns), latent in zip(SIDES, settings["reference_latents"], strict=True)
    ]
    host = patcher.model.extra_conds(minimax_refs=blocks)["minimax_payload"].cond
    given = dit.arguments[0]["minimax_payload"]
    assert [{**block, "latent": 0} for block in given["refs"]] == [{**block, "latent": 0} for block in host["refs"]]
    assert all(map(torch.equal, given["cond_video_latents"], host["cond_video_latents"]))
    clean = REFERENCES.clean_latents(1)
    outputs = []
    for changed in (0.0, 1.0):
        settings["reference_latents"][0] += changed
        with torch.no_grad(), HostedDit(patcher, [caption], REFERENCES.latent_shape).running({}) as denoise:
            outputs.append(denoise(clean, torch.tensor([0.4]), [0]))
    assert not torch.allclose(*outputs, atol=1e-3)


def test_references_of_odd_sides_are_refused(comfyui):
    odd = replace(REFERENCES, settings=lambda generator: {"reference_latents": [torch.zeros(1, 24, 1, 3, 4)]})
    with pytest.raises(InvalidInputError, match="whose latents have even sides, got 4 x 3"):
        odd.hosted(odd.build()).arguments  # noqa: B018


def test_silence_is_as_noisy_as_the_hosts_schedule_makes_it(dit):
    for sigma in (0.0, 0.3, 0.9, 1.0):
        sound = dit.adapter.sound(7, torch.tensor([sigma]))
        base = sigma / (12.0 + sigma * (1.0 - 12.0))  # the video's shift of 12, undone; the sound's is 3
        assert sound.std().item() == pytest.approx(3.0 * base / (1.0 + 2.0 * base), rel=0.1, abs=1e-6)
        assert torch.equal(sound, dit.adapter.sound(7, torch.tensor([sigma])))


def test_skipping_with_stored_residuals_is_the_whole_model(tiny, dit):
    clean, count = tiny.clean_latents(), len(dit.blocks)
    for front, back, tail in ((1, 0, 0), (3, 0, 0), (0, 2, 0), (1, 2, 0), (1, 1, 1)):
        spans = selection(front, back, count, tail)
        computed = precompute_residuals(dit, PLAN, clean, spans, [0, 1])
        for draw in (0, 1):
            noisy, _, sigmas = noisy_batch(PLAN, clean, [draw])
            with torch.no_grad(), dit.running({}) as denoise:
                whole = denoise(noisy, sigmas, [PLAN[draw].caption])
            skipping = replayed(dit, spans, computed.residuals, clean, [draw])
            torch.testing.assert_close(skipping, whole, atol=2e-5 if back else 0.0, rtol=0.0)
    stored = computed.residuals[0].front
    assert stored.img.shape[1] == dit.image_tokens(*tiny.latent_shape[1:]) == dit.frames * 15
    assert (
        stored.txt.shape[1]
        == dit.text_tokens(PLAN[0].caption)
        == 5 + 2 * SOUND[tiny.name] + REFERENCE_TOKENS.get(tiny.name, 0)
    )


@pytest.mark.parametrize("counts", [(1, 1), (2, 0)])
def test_gradients_are_those_of_central_differences(tiny, dit, counts):
    gradients, along, slopes, _ = along_a_direction(tiny, dit, counts, (1e-3, 4e-3))
    assert all(gradient.any() for gradient in gradients.values())
    size = sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5
    errors = [abs(found - along) / size for found in slopes]  # one direction is nearly at a right angle to the gradient
    assert min(errors) < 5e-3, errors


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(tiny, patcher, dit):
    before, spans = weights(patcher), selection(1, 1, len(dit.blocks))
    result, _, adapters = tiny.run(patcher, spans, steps=12, learning_rate=1e-2)
    assert min(result.losses[-4:]) < 0.97 * max(result.losses[:4])
    assert result.self_check < 1e-5
    assert {name.split(".", 2)[2] for name in adapters.names} == tiny.layers
    assert_same_weights(patcher, before)
    assert not patcher.object_patches


def test_cores_loader_patches_every_layer(tiny, patcher, dit):
    import comfy.lora
    import comfy.lora_convert

    adapters = tiny.lora(dit, selection(1, 1, 4), zero=False)
    tensors = comfy.lora_convert.convert_lora(to_file_tensors(adapters.state_dict(), adapters.scale, "peft"))
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert len(comfy.lora.load_lora(tensors, keys)) == len(adapters.names) > 0


def test_a_run_can_be_counted_before_it_starts(tiny, dit):
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    twin = WeightlessDit.of(dit)
    with torch.no_grad(), twin.running({}) as denoise:
        output = denoise(torch.empty(1, *tiny.latent_shape, device="meta"), torch.empty(1, device="meta"), [0])
    assert output.shape == (1, *tiny.latent_shape)
    assert twin.text_tokens(0) == dit.text_tokens(0)


def test_every_weight_is_in_the_stem_the_blocks_or_the_head(dit, patcher):
    parts = {*dit.frozen_stem, *dit.trainable_head, *(block.name for block in dit.blocks)}
    names = dict(patcher.model.diffusion_model.named_parameters())
    assert all(any(name.startswith(part + ".") for part in parts) for name in names)


def test_lengths_of_clips_are_those_of_the_video_vae(patcher):
    import comfy_extras.nodes_minimax_h3 as host
    from blockskip_pack.blockskip_core.hosts.models.adapted_dit import frames_of_clip

    assert [frames_of_clip(patcher, n) for n in (1, 5, 22, 39)] == [1, *map(host.video_latent_t, (5, 22, 39))]
    with pytest.raises(InvalidInputError, match="must be a multiple of 17 plus 5 for this model, got 9. Try 5 or 22"):
        frames_of_clip(patcher, 9)


def test_more_than_one_example_at_a_time_is_refused(tiny, dit):
    noisy, sigmas = tiny.clean_latents(2), torch.tensor([0.4, 0.4])
    with pytest.raises(InvalidInputError, match="takes 1 example at a time, got 2. Set `batch_size` to 1"):
        with torch.no_grad(), dit.running({}) as denoise:
            denoise(noisy, sigmas, [0, 1])

"""Probe pictures with image-to-text attention masked in some blocks."""

from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.text_influence import cosine_distance

from ..hosted_runs import clean_latents, hosted
from ..tiny_flux import assert_same_weights, captions, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

ALL_BLOCKS = frozenset(range(6))
PROBE = {"size": 64, "steps": 2}


@pytest.fixture
def sampling(comfyui):
    from blockskip_pack.blockskip_core.hosts.sampling import probe_pictures as sampling

    return sampling


def sample(sampling, patcher, masked, entry=None, **settings):
    sampler = sampling.MaskedSampler(patcher, sampling.ProbeConfig(**PROBE))
    entry = entry or captions()[0]
    return sampler.sample(entry, entry, seed=3, masked=frozenset(masked), **settings)


def same_pooled(text_seed):
    """Captions with different words but the same pooled vector."""
    entry = captions((5,), seed=text_seed)[0]
    entry[0][1]["pooled_output"] = torch.linspace(-1, 1, 16).view(1, 16)
    return entry


def test_masking_nothing_is_the_plain_model(sampling):
    patcher = tiny_flux()
    wrapper = hosted(patcher).adapter.text_masking_wrapper(frozenset())
    plain = sample(sampling, patcher, ())
    masked = patcher.clone()
    masked.add_wrapper_with_key("apply_model", "test", wrapper)
    assert torch.equal(sample(sampling, masked, ()), plain)
    assert plain.shape == (1, 4, 8, 8)


def test_masking_all_blocks_makes_the_picture_independent_of_the_words(sampling):
    patcher = tiny_flux()
    first, second = (sample(sampling, patcher, ALL_BLOCKS, same_pooled(seed)) for seed in (1, 2))
    assert torch.equal(first, second)
    plain, other = (sample(sampling, patcher, (), same_pooled(seed)) for seed in (1, 2))
    assert not torch.allclose(plain, other, atol=1e-4)
    assert not torch.allclose(plain, first, atol=1e-4)


@pytest.mark.parametrize("left_out", range(6))
def test_one_block_that_still_sees_the_text_lets_it_through(sampling, left_out):
    patcher = tiny_flux()
    masked = ALL_BLOCKS - {left_out}
    first, second = (sample(sampling, patcher, masked, same_pooled(seed)) for seed in (1, 2))
    assert not torch.allclose(first, second, atol=1e-6)


def test_each_block_is_masked_by_its_own_index(sampling):
    patcher = tiny_flux()
    pictures = [sample(sampling, patcher, {block}) for block in range(6)]
    pictures.append(sample(sampling, patcher, ()))
    for i, a in enumerate(pictures):
        assert not any(torch.equal(a, b) for b in pictures[:i])


def test_masked_blocks_are_those_of_a_masked_softmax(sampling):
    """Compared with ComfyUI's own attention with a full mask, inserted as an override."""
    from comfy.ldm.modules.attention import attention_pytorch

    masked = frozenset({1, 2, 5})
    num_text = 5

    def by_hand(_, q, k, v, heads, mask=None, **kwargs):
        options = kwargs["transformer_options"]
        index = options["block_index"] + (2 if options["block_type"] == "single" else 0)
        if index in masked:
            mask = torch.zeros(q.shape[2], k.shape[2])
            mask[num_text:, :num_text] = -torch.inf
        return attention_pytorch(q, k, v, heads, mask=mask, skip_reshape=kwargs["skip_reshape"])

    patcher = tiny_flux()
    other = patcher.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = by_hand
    torch.testing.assert_close(sample(sampling, patcher, masked), sample(sampling, other, ()), atol=1e-5, rtol=0.0)


def test_an_override_of_another_node_stays_in_force(sampling):
    calls = []

    def override(attention, q, k, v, *args, **kwargs):
        calls.append(q.shape[2])
        return attention(q, k, v * 2.0, *args, **kwargs)

    patcher = tiny_flux()
    plain, plain_masked = sample(sampling, patcher, ()), sample(sampling, patcher, {0, 3})
    overridden = patcher.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = override
    changed = sample(sampling, overridden, ())
    assert len(calls) == 2 * 6  # steps, blocks
    changed_masked = sample(sampling, overridden, {0, 3})
    assert len(calls) == 2 * 6 + 2 * (4 + 2 * 2)  # masked blocks call attention twice
    different = [plain, plain_masked, changed, changed_masked]
    for i, a in enumerate(different):
        assert not any(torch.allclose(a, b, atol=1e-5) for b in different[:i])
    options = overridden.model_options["transformer_options"]
    assert options["optimized_attention_override"] is override


def test_the_noise_is_that_of_the_host_without_seeding_its_generators(sampling, monkeypatch):
    import comfy.sample

    seen = []
    monkeypatch.setattr(comfy.sample, "sample", lambda patcher, noise, *_, **__: seen.append(noise))
    torch.manual_seed(123)
    sample(sampling, tiny_flux(), {0})
    assert torch.initial_seed() == 123
    assert torch.equal(seen[0], comfy.sample.prepare_noise(torch.zeros_like(seen[0]), 3))


def test_sampling_leaves_the_model_as_it_was(sampling):
    patcher = tiny_flux()
    before, options, wrappers = weights(patcher), str(patcher.model_options), str(patcher.wrappers)
    sample(sampling, patcher, {0, 3})
    assert_same_weights(patcher, before)
    assert (str(patcher.model_options), str(patcher.wrappers)) == (options, wrappers)


def test_an_interrupt_from_the_step_callback_passes(sampling):
    import comfy.model_management

    steps = []

    def on_step():
        steps.append(1)
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(sampling, tiny_flux(), {1}, on_step=on_step)
    assert steps == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"num_seeds": 0}, "num_seeds must be at least 1"),
     ({"size": 100}, "multiple of 16 px, got 100"), ({"size": 0}, "multiple of 16 px, got 0")],
)  # fmt: skip
def test_probe_settings_out_of_range_are_refused(sampling, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        sampling.ProbeConfig(**settings)


def test_without_an_encoder_latents_are_compared(sampling):
    a, b = clean_latents()[:2]
    metric = sampling.picture_metric(None, None)
    assert "latents" in metric.name
    assert cosine_distance(metric.embed(a), metric.embed(a)) == pytest.approx(0.0, abs=1e-12)
    assert cosine_distance(metric.embed(a), metric.embed(b)) > 0.1


class Output(dict):
    """The output of ComfyUI's CLIP Vision."""


@pytest.mark.parametrize("kind", ["dinov2", "clip_vision_model"])
def test_the_embedding_is_the_class_token_of_dino_and_the_projection_of_clip(sampling, kind):
    tokens, projected = torch.randn(1, 5, 8), torch.randn(1, 6)

    def encode_image(pixels):
        assert pixels.shape == (1, 48, 80, 3)
        return Output(image_embeds=projected, last_hidden_state=tokens)

    vae = SimpleNamespace(decode=lambda latent: torch.zeros(1, latent.shape[2] * 8, latent.shape[3] * 8, 3))
    metric = sampling.picture_metric(vae, SimpleNamespace(encode_image=encode_image, model_type=kind))
    embedded = metric.embed(clean_latents()[:1])
    assert torch.equal(embedded, tokens[:, 0] if kind == "dinov2" else projected)
    assert metric.name == f"{kind} embedding"


def test_frames_of_a_video_model_are_pictures_for_the_encoder(sampling):
    def encode_image(pixels):
        assert pixels.shape == (1, 48, 80, 3)
        return Output(image_embeds=pixels.mean((1, 2)), last_hidden_state=None)

    vae = SimpleNamespace(decode=lambda latent: torch.ones(1, 1, 48, 80, 3))
    metric = sampling.picture_metric(vae, SimpleNamespace(encode_image=encode_image))
    assert metric.embed(torch.zeros(1, 16, 1, 6, 10)).tolist() == [[1.0, 1.0, 1.0]]

"""The loss of words on an example, through small models of ComfyUI's own classes."""

import copy

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError
from blockskip_pack.blockskip_core.training.observer import OnStep
from blockskip_pack.blockskip_core.zoodip.examples import Example, ExampleSchedule
from blockskip_pack.blockskip_core.zoodip.settings import WordSettings
from blockskip_pack.blockskip_core.zoodip.training import WordResult, WordTraining
from blockskip_pack.blockskip_core.zoodip.word import WordLayout

from ..small_clips import small_unet
from ..tiny_flux import assert_same_weights, weights

pytestmark = pytest.mark.usefixtures("comfyui")
CAPTIONS = ("a photo of {word} on grass", "{word} in the sea, left")
EXAMPLE = Example(picture=1, mirrored=False, level=0.6, noise_seed=5)


class Bench:
    """A word of a family, its losses and its first value."""

    def __init__(self, clip, model, **options):
        from blockskip_pack.blockskip_core.hosts.words.captions import WordCaptions
        from blockskip_pack.blockskip_core.hosts.words.encoders import known_word
        from blockskip_pack.blockskip_core.hosts.words.losses import WordLosses

        parts, vectors = known_word(clip, "dog")
        self.layout, self.clip, self.model = WordLayout(parts), clip, model
        self.first = self.layout.join(vectors)
        self.captions = WordCaptions(clip, CAPTIONS, parts)
        self.latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        self.losses = WordLosses(model, self.captions, self.layout, self.latents, 2, **options)

    def words(self, count=4):
        noise = torch.randn(count, self.layout.numbers, generator=torch.Generator().manual_seed(2))
        return self.first + 0.5 * self.layout.sizes * noise

    def train(self, on_step=lambda report: None, steps=3):
        result = WordResult()
        settings = WordSettings(steps=steps, directions=3)
        examples = ExampleSchedule(0, 2, lowest=0.0, highest=1.0)
        training = WordTraining(self.losses, self.layout, self.first, examples, settings, result=result)
        with self.losses.loaded(settings.passes_per_step):
            training.run([OnStep(on_step)])
        return training, result


@pytest.fixture(params=["SD1.5", "SDXL", "FLUX.1"])
def bench(request, clip_of, model_of):
    return Bench(clip_of(request.param), model_of(request.param))


@torch.no_grad()
def test_one_batch_of_words_has_the_losses_of_one_word_after_the_other(bench):
    words = bench.words()
    with bench.losses.loaded(4):
        together = bench.losses(words, EXAMPLE)
        single = torch.cat([bench.losses(word[None], EXAMPLE) for word in words])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=0.0)
    assert bench.losses.forwards == 8
    assert together.std() > 1e-6 * together.mean(), "the loss depends on the word"


@pytest.mark.parametrize("family", ["SD1.5", "v prediction", "FLUX.1"])
@torch.no_grad()
def test_it_is_the_error_of_the_models_own_output(clip_of, model_of, family):
    """Computed anew from the model's network, without the host's sampling."""
    name = "SD1.5" if family == "v prediction" else family
    model = small_unet("V_PREDICTION") if family == "v prediction" else model_of(name)
    bench = Bench(clip_of(name), model)
    clean, noise = bench.latents[1:2], EXAMPLE.noise((1, 4, 8, 8))
    sampling = model.model.model_sampling
    if family == "FLUX.1":
        scale, sigma = 1.0, torch.tensor([0.6])
        noisy, target = 0.4 * clean + 0.6 * noise, noise - clean
    else:
        sigma = sampling.sigma(torch.tensor([0.6 * 999]))
        scale = (1.0 + sigma**2) ** -0.5
        noisy = (clean + sigma * noise) * scale
        target = noise if family == "SD1.5" else scale * noise - sigma * scale * clean
    with bench.losses.loaded(1):
        found = bench.losses(bench.first[None], EXAMPLE)
        ((context, settings),) = bench.losses.conditioning(bench.first, 1)
    extra = {"y": settings["pooled_output"]} if family == "FLUX.1" else {}
    output = model.model.diffusion_model(noisy, sampling.timestep(sigma).float(), context=context, **extra)
    torch.testing.assert_close(found[0], (output - target).square().mean(), rtol=1e-4, atol=0.0)


@torch.no_grad()
def test_the_word_in_the_loss_is_the_one_that_the_host_reads_from_a_file(bench, embeddings):
    """So what is learned is what a prompt with the file will do."""
    from safetensors.torch import save_file

    word = bench.words(1)[0]
    save_file(
        {key: tensor.clone() for key, tensor in bench.layout.split(word).items()}, embeddings / "dog_1.safetensors"
    )
    with bench.losses.loaded(1):
        ((ours, about),) = bench.losses.conditioning(word, 0)
    tokens = bench.clip.tokenize(CAPTIONS[0].replace("{word}", "embedding:dog_1"))
    ((theirs, others),) = bench.clip.encode_from_tokens_scheduled(tokens)
    assert torch.equal(ours, theirs)
    if about["pooled_output"] is not None:
        assert torch.equal(about["pooled_output"], others["pooled_output"])


@torch.no_grad()
def test_mirrored_examples_use_the_mirrored_latents(bench):
    with bench.losses.loaded(1):
        mirrored = bench.losses(bench.first[None], Example(1, True, 0.6, 5))
        bench.latents[1] = bench.latents[3]
        assert torch.equal(mirrored, bench.losses(bench.first[None], EXAMPLE))


class Stop(Exception):
    """The user's Cancel."""


@pytest.mark.parametrize("stops", [False, True])
def test_the_shared_clip_and_model_are_unchanged_after_a_run_and_after_an_interrupt(bench, stops):
    def on_step(report):
        if stops and report.step == 2:
            raise Stop

    clip, model = bench.clip, bench.model
    before = weights(model), weights(clip.patcher)
    seen = dict(vars(clip)), dict(vars(clip.tokenizer)), copy.deepcopy(model.model_options), dict(model.object_patches)
    try:
        bench.train(on_step)
    except Stop:
        assert stops
    assert_same_weights(model, before[0])
    assert_same_weights(clip.patcher, before[1])
    assert (dict(vars(clip)), dict(vars(clip.tokenizer)), model.model_options, dict(model.object_patches)) == seen
    assert model.model.current_patcher is None
    assert "load_model" not in vars(bench.captions.clip)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_a_run_needs_no_gradients_and_counts_its_passes(bench):
    training, result = bench.train()
    assert result.forwards == bench.losses.forwards == 9
    assert not torch.equal(training.word, bench.first)
    assert not training.word.requires_grad
    assert all(parameter.grad is None for parameter in bench.model.model.parameters())


def test_in_turns_gives_the_same_numbers(clip_of, model_of, monkeypatch):
    import comfy.model_management
    from blockskip_pack.blockskip_core.hosts.words import losses

    clip, model = clip_of("SD1.5"), model_of("SD1.5")
    together, in_turns = Bench(clip, model, residency="together"), Bench(clip, model, residency="in turns")
    calls = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda m, **o: (calls.append(len(m)), load(m, **o)))
    expected = together.train()[0].word
    assert calls == [2], "both are loaded once"
    calls.clear()
    dropped = []
    monkeypatch.setattr(losses, "drop_cast_buffers", lambda: dropped.append(len(calls)))
    assert torch.equal(in_turns.train()[0].word, expected)
    assert calls == [1] * 12, "three prompts and one model in each of three steps"
    assert dropped == [0, 3, 4, 7, 8, 11, 12], "the other model's streaming buffers, before each turn and at the end"


@pytest.mark.parametrize(("devices", "total", "together"), [
    (("cuda", "cuda"), 2**40, True), (("cuda", "cuda"), 2**20, False), (("cuda", "cpu"), 2**20, True),
    (("cpu", "cpu"), 2**20, True),
])  # fmt: skip
def test_both_models_stay_loaded_if_they_fit(bench, monkeypatch, devices, total, together):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: total)
    losses = bench.losses
    losses._patcher.load_device, losses._clip.patcher.load_device = map(torch.device, devices)
    assert losses._fit_together(2**20) == together


@torch.no_grad()
def test_models_that_cannot_be_taken_back_after_sampling_are_taken_back_by_the_next_evaluation(bench, monkeypatch):
    import comfy.model_management

    load, out_of_memory = comfy.model_management.load_models_gpu, [False, True]

    def short_of_memory(*args, **options):
        if out_of_memory.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(*args, **options)

    words = bench.words()
    with bench.losses.loaded(4):
        expected = bench.losses(words, EXAMPLE)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", short_of_memory)
    with bench.losses.loaded(4):
        with bench.losses.set_aside():
            pass
        with pytest.raises(torch.OutOfMemoryError):
            bench.losses(words, EXAMPLE)
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
        assert torch.equal(bench.losses(words, EXAMPLE), expected)


@pytest.mark.parametrize("unloads", ["text encoders", "model", "another clone's text encoders"])
@pytest.mark.parametrize("after_sampling", [False, True])
@torch.no_grad()
def test_what_the_host_unloads_between_steps_is_loaded_again_with_its_patches(
    clip_of, model_of, unloads, after_sampling
):
    """As for the likeness's CLIP Vision on a card that is short of memory: the text encoders lost their LoRA then."""
    import comfy.model_management

    clip = clip_of("SD1.5").clone()
    weights = clip.patcher.model_state_dict()
    names = [name for name in weights if name.endswith("mlp.fc1.weight")]
    difference = {name: (0.5 * torch.ones_like(weights[name]),) for name in names}
    assert sorted(clip.patcher.add_patches(difference, 1.0)) == sorted(names)
    bench = Bench(clip, model_of("SD1.5"))
    words, loaded = bench.words(), comfy.model_management.current_loaded_models
    kept = bench.losses._patcher if unloads == "text encoders" else bench.losses._clip.patcher
    with bench.losses.loaded(4):
        expected = bench.losses(words, EXAMPLE)
        if after_sampling:
            with bench.losses.set_aside():
                pass
        if unloads == "another clone's text encoders":
            comfy.model_management.load_models_gpu([clip_of("SD1.5").clone().patcher])
        else:
            others = [each for each in loaded if each.model is kept]
            comfy.model_management.free_memory(1e30, kept.load_device, keep_loaded=others)
        assert torch.equal(bench.losses(words, EXAMPLE), expected)
    assert not torch.equal(expected, _without_patches(clip_of, model_of, words)), "the patches matter"


def _without_patches(clip_of, model_of, words):
    bench = Bench(clip_of("SD1.5"), model_of("SD1.5"))
    with bench.losses.loaded(4):
        return bench.losses(words, EXAMPLE)


def test_what_belongs_to_sampling_is_left_out(bench, caplog):
    from blockskip_pack.blockskip_core.hosts.words.losses import as_called

    model = bench.model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    model.model_options["transformer_options"]["wrappers"] = {"apply_model": {"cache": [lambda *a: None]}}
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    model.add_wrapper_with_key("outer_sample", "easycache", lambda executor, *a: executor(*a))
    called = as_called(model)
    assert called.wrappers == {}
    assert model.wrappers
    assert called.model_options["transformer_options"].keys() == {"patches"}
    assert called.model_options.keys() == {"transformer_options"}
    assert "easycache, sampler_cfg_function, wrappers" in caplog.text
    assert "wrappers" in model.model_options["transformer_options"]


def test_another_model_in_the_blocks_is_refused(bench):
    from blockskip_pack.blockskip_core.hosts.words.losses import as_called

    class Control:
        def models(self):
            return []

    model = bench.model.clone()
    model.set_model_patch(Control(), "double_block")
    with pytest.raises(UnsupportedModelError, match="another model in the MODEL's blocks"):
        as_called(model)


def test_wrong_numbers_of_captions_and_unknown_residencies_are_refused(bench):
    from blockskip_pack.blockskip_core.hosts.words.losses import WordLosses

    given = (bench.model, bench.captions, bench.layout, bench.latents)
    with pytest.raises(InvalidInputError, match="one caption for all pictures or one for each of 3, got 2"):
        WordLosses(*given, 3)
    with pytest.raises(InvalidInputError, match="residency must be one of auto, together, in turns"):
        WordLosses(*given, 2, residency="half")

"""Train Word and CLIP with Embeddings as called by ComfyUI."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ..trainings import assert_same, cancelled_after, shown_in_tensorboard


def saved(words, number=1):
    return load_file(words.folder / f"my_dog_{number:05}.safetensors")


def test_a_run_gives_a_file_that_prompts_can_name(words):
    word, clip, loss_map, steps, report = words.train().args
    assert word == "embedding:my_dog_00001"
    assert words.files() == ["my_dog_00001.safetensors"]
    assert clip is words.clip, "its tokenizers take embedding files anyway"
    assert len(loss_map["loss"]) == steps == 4
    assert "Write embedding:my_dog_00001 in a prompt." in report
    assert "clip_l 1 x 16, t5xxl 1 x 16" in report
    assert "4 steps with 3 forward passes each, 0 of them by an earlier run." in report
    vectors = saved(words)
    assert {key: tuple(tensor.shape) for key, tensor in vectors.items()} == {"clip_l": (1, 16), "t5xxl": (1, 16)}
    with safe_open(words.folder / "my_dog_00001.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["blockskip_word"])
    assert (about["steps"], about["like_word"], about["perturbation"]) == (4, "dog", 0.2)


def test_a_prompt_with_the_word_is_read_by_core_as_it_was_trained(words, nodes):
    """CLIPTextEncode of ComfyUI finds the file; the conditioning differs from that of the word at the start."""
    words.train()
    tokens = words.clip.tokenize("a embedding:my_dog_00001 in the sea")
    found = [token for token, _ in tokens["l"][0] if isinstance(token, torch.Tensor)]
    assert len(found) == 1
    assert torch.equal(found[0], saved(words)["clip_l"][0])
    with torch.inference_mode():
        learned = words.clip.encode_from_tokens_scheduled(tokens)[0][0]
        plain = words.clip.encode_from_tokens_scheduled(words.clip.tokenize("a dog in the sea"))[0][0]
    assert not torch.equal(learned, plain)


def test_one_seed_gives_one_word_and_every_run_another_file(words):
    for seed in (3, 3, 4):
        words.train(seed=seed, resume=False)
    assert_same(saved(words, 1), saved(words, 2))
    assert not torch.equal(saved(words, 1)["clip_l"], saved(words, 3)["clip_l"])


@pytest.mark.parametrize(
    "settings",
    [{}, {"estimator": "central", "subspace_every": 2, "subspace_share": 0.5, "mirror": True, "fixed_examples": 3}],
)
def test_queueing_again_after_cancel_goes_on_to_the_same_word(words, nodes, monkeypatch, settings):
    expected = words.train(**settings, resume=False)
    for path in words.folders.output.glob("blockskip/runs/*/*"):
        path.unlink()
    with cancelled_after(nodes, monkeypatch, 2):
        words.train(**settings)
    assert words.files() == ["my_dog_00001.safetensors", "my_dog_00002.safetensors"], "the word so far"
    done = words.train(**settings)
    assert_same(saved(words, 3), saved(words, 1))
    assert not torch.equal(saved(words, 2)["clip_l"], saved(words, 1)["clip_l"])
    assert done[2] == expected[2]
    assert "2 of them by an earlier run" in done[4]


def test_tensorboard_shows_a_run_that_resumes_as_one_curve(words, nodes, monkeypatch):
    pytest.importorskip("tensorboard")
    with cancelled_after(nodes, monkeypatch, 2):
        words.train(name="new\\my_dog", tensorboard=True)
    losses = words.train(name="new/my_dog", tensorboard=True)[2]["loss"]
    (folder,) = words.folders.output.glob("new/tensorboard/my_dog-????????")
    figures, pictures = shown_in_tensorboard(folder)
    assert pictures == {}
    assert list(figures["training/loss"].values()) == pytest.approx(losses, rel=1e-6)
    assert set(figures) == {
        "training/loss", "training/loss_smoothed", "training/step_size", "training/gradient_norm", "memory/GiB_now",
        "memory/GiB_peak",
    }  # fmt: skip
    assert all(list(curve) == [1, 2, 3, 4] for curve in figures.values())


def test_cancel_before_the_first_step_leaves_nothing(words, monkeypatch):
    import comfy.model_management

    def cancel():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        words.train()
    assert words.files() == []
    assert words.folders.files() == []


@pytest.mark.parametrize("step", [None, 2])
def test_model_and_clip_are_as_before(words, tiny, nodes, monkeypatch, step):
    before = tiny.weights(words.model), tiny.weights(words.clip.patcher)
    seen = dict(vars(words.clip)), dict(vars(words.clip.tokenizer)), dict(words.model.model_options)
    if step is None:
        words.train()
    else:
        with cancelled_after(nodes, monkeypatch, step):
            words.train()
    tiny.assert_same_weights(words.model, before[0])
    tiny.assert_same_weights(words.clip.patcher, before[1])
    assert (dict(vars(words.clip)), dict(vars(words.clip.tokenizer)), dict(words.model.model_options)) == seen
    assert words.model.model.current_patcher is None
    assert list(words.folders.temp.rglob("*")) == []


def test_the_perturbation_is_checked_and_the_report_says_so(words):
    report = words.train(check_perturbation=True)[4]
    measured = re.search(r"slopes agree ([\d.]+) at 0.1, ([\d.]+) at 0.2, ([\d.]+) at 0.4", report)
    assert min(map(float, measured.groups())) > 0.95
    assert "(144 forward passes)" in report


@pytest.fixture
def picks(nodes, monkeypatch):
    """Perturbations that the check picks, as another GPU or a restart may: one for each measurement."""
    import sys

    module = sys.modules[nodes.words.__name__ + ".prepare"]
    measure, left = module.measure_signal, [0.4, 0.1]

    def picked(*args):
        return dataclasses.replace(measure(*args), perturbation=left.pop(0))

    monkeypatch.setattr(module, "measure_signal", picked)
    return left


def test_a_run_that_resumes_keeps_the_perturbation_that_it_began_with(words, nodes, monkeypatch, picks):
    words.train(perturbation=0.4, resume=False)
    for path in words.folders.output.glob("blockskip/runs/*/*"):
        path.unlink()
    with cancelled_after(nodes, monkeypatch, 2):
        words.train(check_perturbation=True)
    report = words.train(check_perturbation=True)[4]
    assert picks == [0.1], "measured once"
    assert "2 of them by an earlier run" in report
    assert "Perturbation 0.4, step size 0.4; checked by the earlier run." in report
    assert_same(saved(words, 3), saved(words, 1))
    with safe_open(words.folder / "my_dog_00003.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["blockskip_word"])["perturbation"] == 0.4
    report = words.train(check_perturbation=True, resume=False)[4]
    assert picks == []
    assert "Perturbation 0.1, step size 0.4; slopes agree" in report


def test_states_that_name_a_measured_perturbation_as_that_asked_for_are_not_used(words, nodes, monkeypatch, picks):
    """Earlier versions did: their key is that of a run without the check."""
    with cancelled_after(nodes, monkeypatch, 2):
        words.train(perturbation=0.4, check_perturbation=False)
    report = words.train(perturbation=0.4, check_perturbation=True)[4]
    assert "0 of them by an earlier run" in report
    assert picks == [0.1]


def test_the_paper_is_one_choice(words):
    report = words.train(estimator="paper", directions=9, noise_from=0.1)[4]
    assert "4 steps with 3 forward passes each" in report
    assert "Perturbation 0.0719, step size 0.36" in report


def test_one_caption_for_each_picture_and_several_vectors(words):
    words.train(captions="a {word} on grass\n\nthe {word}, left\n{word} in the sea", like_word="a friendly dog")
    assert saved(words)["clip_l"].shape == (3, 16)


def test_the_chart_gets_every_step(words):
    run = words.train().ui["blockskip_chart"][0]
    assert (run["step"], run["steps"], run["status"]) == (4, 4, "done")
    assert len(run["points"]) == 4


@pytest.fixture
def sampling(words, vae, nodes, run_node):
    """Sample While Training; its own prompt is one without the word."""

    def request(**changes):
        prompt = words.clip.encode_from_tokens_scheduled(words.clip.tokenize("a plain prompt"))
        ordinary = {
            "positive": prompt, "vae": vae, "every": 2, "at_start": True, "width": 64, "height": 32, "sampler_steps": 2,
            "cfg": 1.0, "scheduler": "simple", "seed": 1,
        }  # fmt: skip
        return run_node(nodes.SampleWhileTraining, **{**ordinary, **changes})[0]

    return request


def sampled(trained):
    """(step, prompt) of the pictures that the chart shows."""
    return [(shown["step"], shown["prompt"]) for shown in trained.ui["blockskip_chart"][0]["samples"]]


@pytest.mark.parametrize("residency", ["together", "in turns"])
def test_samples_while_training_show_the_word_and_change_nothing(words, sampling, residency):
    plain = words.train(steps=5, resume=False)
    prompts = {"sample_prompts": "a {word} in the sea\n\n{word} on grass"}
    trained = words.train(steps=5, resume=False, samples=sampling(), residency=residency, **prompts)
    assert_same(saved(words, 1), saved(words, 2))
    assert trained[2] == plain[2]
    assert "failed" not in trained[4]
    assert sampled(trained) == [(step, prompt) for step in (0, 2, 4, 5) for prompt in (1, 2)]
    files = [
        words.folders.output / shown["subfolder"] / shown["file"]
        for shown in trained.ui["blockskip_chart"][0]["samples"]
    ]
    assert {path.parent for path in files} == {words.folders.output / "words"}
    with Image.open(files[0]) as first, Image.open(files[1]) as other, Image.open(files[-2]) as last:
        assert first.size == (64, 32)
        assert first.tobytes() != last.tobytes(), "the word has changed the picture"
        assert first.tobytes() != other.tobytes(), "the prompts differ"
    assert "load_model" not in vars(words.clip)
    assert words.model.model.current_patcher is None


def test_a_likeness_for_which_the_host_unloads_the_models_changes_nothing(
    words, sampling, encoder, pictures, monkeypatch
):
    """On a card that is short of memory the text encoders went, and with them the LoRA that the user has put on them."""
    import comfy.model_management

    def encode_image(image):
        comfy.model_management.free_memory(1e30, encoder.patcher.load_device)
        unloaded.append(not comfy.model_management.current_loaded_models)
        return encode(image)

    encode, unloaded, clip = encoder.encode_image, [], words.clip.clone()
    monkeypatch.setattr(encoder, "encode_image", encode_image)
    weights = {name: x for name, x in clip.patcher.model_state_dict().items() if name.endswith("mlp.fc1.weight")}
    assert clip.patcher.add_patches({name: (0.5 * torch.ones_like(x),) for name, x in weights.items()}, 1.0)
    common = {"steps": 5, "clip": clip, "resume": False}
    plain = words.train(**common)
    trained = words.train(**common, samples=sampling(clip_vision=encoder, reference_images=pictures))
    assert any(unloaded)
    assert all(shown["likeness"] is not None for shown in trained.ui["blockskip_chart"][0]["samples"])
    assert trained[2] == plain[2]
    assert_same(saved(words, 1), saved(words, 2))
    assert words.train(**{**common, "clip": words.clip})[2] != plain[2], "the LoRA matters"


def test_a_cache_on_the_model_is_left_out_of_learning_and_of_its_samples(words, sampling):
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = EasyCacheNode.execute(words.model, 0.2, 0.0, 1.0, False).args[0]
    common = {"steps": 2, "resume": False, "samples": sampling(), "sample_prompts": "a {word} in the sea"}
    words.train(**common)
    trained = words.train(model=cached, **common)
    assert_same(saved(words, 1), saved(words, 2))
    assert "failed" not in trained[4]
    assert sampled(trained) == [(0, 1), (2, 1)]
    assert cached.wrappers


@pytest.mark.parametrize(
    ("family", "cfg", "guidance"),
    [
        ("FLUX.1", 1.0, {}),
        ("FLUX.1", 1.0, {"guidance": 3.5}),
        ("FLUX.1", 1.0, {"guidance": 9.0}),
        ("SD1.5", 4.0, {}),
    ],
)
def test_the_last_sample_is_the_picture_that_a_prompt_with_the_file_gives(
    words, sampling, small, tiny, vae, monkeypatch, family, cfg, guidance
):
    """Encoded, sampled and decoded by ComfyUI's own functions; a U-Net with guidance away from another prompt too.

    The guidance of FLUX.1-dev is that of Flux Guidance before the sampling node, or ComfyUI's default, not the training's.
    """
    import comfy.sample

    latents, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda latent: latents.append(latent) or decode(latent))
    model = tiny.tiny_flux(guidance=True) if family == "FLUX.1" else small.small_unet()
    clip = small.small_clip(family, str(words.folder))
    with torch.inference_mode():
        negative = clip.encode_from_tokens_scheduled(clip.tokenize("a cloud"))
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a plain prompt"), add_dict=guidance)
    request = sampling(cfg=cfg, positive=positive, negative=negative)
    trained = words.train(model=model, clip=clip, samples=request, sample_prompts="a {word} in the sea", guidance=1.0)
    tokens = clip.tokenize("a embedding:my_dog_00001 in the sea")
    with torch.inference_mode():
        prompt = clip.encode_from_tokens_scheduled(tokens, add_dict=guidance)
        empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 4, 8))
        noise = comfy.sample.prepare_noise(empty, 1)
        latent = comfy.sample.sample(model, noise, 2, cfg, "euler", "simple", prompt, negative, empty, seed=1)
        picture = (decode(latent)[0] * 255.0).round().clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(latents[-1], latent)
    assert not torch.allclose(latents[0], latent), "the word has changed the picture"
    shown = trained.ui["blockskip_chart"][0]["samples"][-1]
    with Image.open(words.folders.output / shown["subfolder"] / shown["file"]) as last:
        found = torch.frombuffer(bytearray(last.tobytes()), dtype=torch.uint8)
    assert (found.int() - picture.flatten().int()).abs().max() <= 1


@pytest.mark.parametrize(("family", "cfg"), [("FLUX.1", 1.0), ("SD1.5", 4.0)])
def test_cancel_while_sampling_keeps_the_word_and_a_run_that_resumes_shows_the_samples(
    words, nodes, sampling, small, monkeypatch, family, cfg
):
    import comfy.model_management

    model = words.model if family == "FLUX.1" else small.small_unet()
    clip = small.small_clip(family, str(words.folder))
    with torch.inference_mode():
        negative = clip.encode_from_tokens_scheduled(clip.tokenize("a cloud"))
    common = {"model": model, "clip": clip, "steps": 5}
    words.train(**common, resume=False)
    for path in words.folders.output.glob("blockskip/runs/*/*"):
        path.unlink()
    show = nodes.page.progress.NodeProgress.__call__

    def cancelling(self, phase, done, total, detail=""):
        if phase == "sampling after step 2" and done:
            raise comfy.model_management.InterruptProcessingException
        show(self, phase, done, total, detail)

    common["samples"] = sampling(cfg=cfg, negative=negative)
    with monkeypatch.context() as patch:
        patch.setattr(nodes.page.progress.NodeProgress, "__call__", cancelling)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            words.train(**common)
    assert len(words.files()) == 2, "the word so far"
    assert model.model.current_patcher is None
    trained = words.train(**common)
    assert_same(saved(words, 1), saved(words, 3))
    assert "2 of them by an earlier run" in trained[4]
    assert sampled(trained) == [(0, 1), (2, 1), (4, 1), (5, 1)]
    assert sampled(words.train(**common)) == sampled(trained), "nothing is made twice"


def test_sampling_that_fails_is_told_and_ends_nothing(words, sampling, vae, monkeypatch):
    def broken(latent):
        raise RuntimeError("out of paint")

    words.train(resume=False)
    monkeypatch.setattr(vae, "decode", broken)
    report = words.train(samples=sampling(), resume=False)[4]
    assert "Sampling after step 0 failed (RuntimeError: out of paint). This run samples no more pictures" in report
    assert_same(saved(words, 1), saved(words, 2))


def test_samples_are_refused_with_a_sentence(words, sampling):
    refused(words, "samples must come from Sample While Training, got a str", samples="every 100 steps")
    refused(
        words, "Every line of sample_prompts needs {word} where the new word is, got 'a dog'", samples=sampling(),
        sample_prompts="{word}\na dog",
    )  # fmt: skip


def refused(words, match, **changes):
    with pytest.raises(ValueError, match=match) as error:
        words.train(**changes)
    assert words.files() == []
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"captions": ""}, "captions is empty. Write one line"),
        ({"captions": "a photo"}, "Every caption needs {word} where the new word is, got 'a photo'"),
        ({"captions": "a {word}\na {word}"}, "one line for each of the 3 pictures, got 2 lines"),
        ({"captions": "a{word}"}, "clip_l finds 0 of 1 vectors of the word in the caption 'a{word}'"),
        ({"like_word": " "}, "like_word must be a word or a few of 1 to 32 tokens"),
        ({"name": "my dog"}, "The name 'my dog' has ' ' in it, at which a prompt ends a word's name"),
        ({"name": "../dog"}, "must stay inside"),
        ({"name": "x" * 300}, "cannot be written"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"directions": 1}, "leave-one-out needs 2 to 4096 directions, got 1"),
        ({"estimator": "newton"}, "estimator must be one of leave-one-out, forward difference, central, paper"),
        ({"step_size": float("nan")}, "step_size must be a positive number, got nan"),
        ({"perturbation": 0.0}, "perturbation must be a positive number, got 0.0"),
        ({"noise_from": 0.5, "noise_to": 0.5}, "Noise levels need 0 <= lowest < highest <= 1, got 0.5 and 0.5"),
        ({"fixed_examples": -1}, "no negative pool"),
        ({"subspace_every": 1}, "between decompositions"),
        ({"guidance": -1.0}, "guidance must not be negative"),
        ({"residency": "half"}, "residency must be one of auto, together, in turns"),
        ({"resolution": 40}, "resolution must be a multiple of 16 px for this VAE, got 40"),
        ({"save_every": -1}, "save_every must not be negative"),
        ({"clip": None}, "`clip` must be a CLIP, from Load CLIP, got a NoneType"),
        ({"vae": 3}, "`vae` must be a VAE"),
        ({"images": torch.zeros(0, 8, 8, 3)}, "No pictures came in"),
        ({"captions": 7}, "`captions` must be a text, got a int"),
    ],
)  # fmt: skip
def test_it_refuses_in_one_sentence(words, changes, match):
    refused(words, match, **changes)


def test_a_loss_that_is_not_finite_later_keeps_what_was_learned(words, nodes, monkeypatch):
    module = nodes.words.prepare.WordLosses
    evaluate = module.__call__
    calls = []

    def breaking(self, rows, example):
        calls.append(len(rows))
        return evaluate(self, rows, example) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(module, "__call__", breaking)
    with pytest.raises(
        ValueError, match=r"The loss of step 3 is not finite.* saved as embedding:my_dog_00001\."
    ) as error:
        words.train()
    assert type(error.value).__name__ == "TrainingError"
    assert words.files() == ["my_dog_00001.safetensors"]


def test_running_out_of_memory_is_one_sentence(words, nodes, monkeypatch):
    def full(self, rows, example):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nodes.words.prepare.WordLosses, "__call__", full)
    with pytest.raises(ValueError, match="Learning the word ran out of memory .* Lower `directions` or `resolution`"):
        words.train()


def test_running_out_of_memory_later_keeps_the_word_so_far_and_names_it(words, nodes, monkeypatch):
    module = nodes.words.prepare.WordLosses
    evaluate, calls = module.__call__, []

    def filling(self, rows, example):
        calls.append(len(rows))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, rows, example)

    monkeypatch.setattr(module, "__call__", filling)
    said = r"ran out of memory after step 2 .* Lower `directions` .* saved as embedding:my_dog_00001\."
    with pytest.raises(ValueError, match=said):
        words.train()
    assert words.files() == ["my_dog_00001.safetensors"]


def test_clip_with_embeddings_passes_on_what_takes_them(words, nodes, run_node, small):
    assert run_node(nodes.AcceptEmbeddings, clip=words.clip)[0] is words.clip
    qwen = small.small_clip("Qwen-Image", str(words.folder))
    taking = run_node(nodes.AcceptEmbeddings, clip=qwen)[0]
    assert taking is not qwen
    assert taking.tokenizer.qwen25_7b.embedding_directory == [str(words.folder)]
    assert qwen.tokenizer.qwen25_7b.embedding_directory is None


@pytest.mark.parametrize("clip", [None, 3])
def test_clip_with_embeddings_refuses_other_things(nodes, run_node, clip):
    with pytest.raises(ValueError, match="`clip` must be a CLIP, from Load CLIP"):
        run_node(nodes.AcceptEmbeddings, clip=clip)

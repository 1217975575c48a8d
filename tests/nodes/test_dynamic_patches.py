"""Train, load and use patch adapters as ComfyUI calls the nodes; what they say, refuse and leave behind."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from ..hosts.tiny_families import FAMILIES
from .conftest import Listed
from .test_families import FamilyVae
from .trainings import shown_in_tensorboard

TRAINING = {
    "patch_sizes": "2x", "width": 64, "height": 96, "max_steps": 4, "peak_learning_rate": 1e-2, "batch_size": 2, "seed": 3,
    "adapters_name": "loras/patch_adapters", "pictures_per_prompt": 1, "sampler_steps": 2, "validate_every": 2,
    "save_every": 1, "lora_rank": 2,
}  # fmt: skip
SIGMAS = torch.linspace(1, 0, 9)
LATENT = {"samples": torch.zeros(1, 4, 8, 12)}


@pytest.fixture
def prompts(tiny):
    """Three prompts, as a list."""
    return Listed(tiny.captions((5, 5, 4), seed=8))


@pytest.fixture
def train(nodes, model, prompts, run_node, folders):
    """Train; every call takes the inputs that differ from the defaults."""

    def run(**changes):
        return run_node(nodes.TrainPatchAdapters, **{"model": model, "positive": prompts, **TRAINING, **changes}).args

    return run


@pytest.fixture
def trained(train):
    return train()[0]


@pytest.fixture
def use(nodes, model, run_node):
    def run(adapters, **changes):
        given = {"model": model, "mode": "windows", "error_budget": 0.1, "patch_adapters": adapters, **changes}
        return run_node(nodes.DynamicPatchesNode, **given).args

    return run


def sampled(model, prompt, steps=8, cfg=1.0):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    with torch.inference_mode():
        euler = comfy.samplers.sampler_object("euler")
        return SamplerCustom.execute(
            model, True, 7, cfg, prompt, prompt, euler, torch.linspace(1, 0, steps + 1), LATENT
        ).args[0]["samples"]  # fmt: skip


def test_a_training_saves_a_file_that_is_loaded_again(nodes, train, folders, run_node, model):
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    adapters, errors, report = train()
    assert report.startswith("Saved patch_adapters_00001_.safetensors in loras.")
    assert "2x: " in report
    assert "on held-out prompts" in report
    assert errors.shape == (1, 300, 640, 3)
    assert (folders.loras / "patch_adapters_00001_.safetensors").is_file()
    loaded, info = run_node(nodes.LoadPatchAdapters, file="patch_adapters_00001_.safetensors").args
    assert info == "\n".join(report.splitlines()[1:])
    assert all(torch.equal(loaded.tensors()[name], tensor) for name, tensor in adapters.tensors().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    kept = [name for name in folders.files() if "blockskip" in name]
    assert sum("latents" in name for name in kept) == 1
    assert any("runs" in name for name in kept)


def test_the_report_says_what_went_wrong(train, monkeypatch):
    from blockskip_pack.blockskip_core.hosts.sampling import patch_training

    def distill(*args, result, **more):
        real(*args, result=result, **more)
        result.overflows, result.problems = 3, ["The disk is full."]

    real = patch_training.distill
    monkeypatch.setattr(patch_training, "distill", distill)
    *_, first, second = train(max_steps=1)[2].splitlines()
    assert first == "2x: The disk is full."
    assert second.startswith("2x: 3 steps were skipped because gradients overflowed in float16")


def test_two_sizes_and_a_negative(train, tiny):
    adapters, _, report = train(
        patch_sizes="2x and 4x", negative=Listed(tiny.captions((5,))), cfg=2.0, max_steps=1, height=64
    )
    assert set(adapters.scales) == {2, 4}
    assert "4x: " in report


def test_given_pictures_take_the_place_of_the_models_own(train, nodes, vae, folders, monkeypatch):
    from blockskip_pack.nodes.page import progress

    shown, sizes = [], []
    monkeypatch.setattr(progress.NodeProgress, "show", lambda self, picture: shown.append(picture.size))
    encode = type(vae).encode
    monkeypatch.setattr(
        type(vae), "encode", lambda self, pixels: (sizes.append(tuple(pixels.shape[1:3])), encode(self, pixels))[1]
    )
    pictures = Listed([torch.rand(1, 200, 160, 3), torch.rand(2, 96, 64, 3)])
    adapters = train(images=pictures, vae=vae, cfg=3.0)[0]
    assert sizes == [(96, 64)] * 3
    assert not any("latents" in name for name in folders.files()), "nothing was sampled"
    assert shown == [(640, 300)] * 3, "a picture of errors before the first step and after every second"
    assert not all(torch.equal(adapters.tensors()[name], tensor) for name, tensor in train()[0].tensors().items())


def test_the_chart_gets_every_step_of_every_size(nodes, model, prompts, run_node):
    shown = run_node(nodes.TrainPatchAdapters, **{
        "model": model, "positive": prompts, **TRAINING, "patch_sizes": "2x and 4x", "height": 64, "max_steps": 2,
    }).ui["blockskip_chart"][0]  # fmt: skip
    assert (shown["step"], shown["steps"], shown["status"], len(shown["points"])) == (4, 4, "done", 4)


@pytest.mark.parametrize(
    ("levels", "where"),
    [({}, "training 3"), ({}, "measuring 5"), ({"train_on": "every other step", "planned_steps": 5}, "training 3")],
    ids=["all", "in a measurement", "coarse"],
)
def test_a_training_that_was_cancelled_is_resumed_bit_for_bit(train, nodes, folders, monkeypatch, levels, where):
    import comfy.model_management
    from blockskip_pack.nodes.page import progress

    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    whole = train(resume=False, **levels)[0].tensors()
    seen = []

    def cancel(self, phase, done, total, detail=""):
        seen.append(f"{phase.split()[0]} {done}")
        if seen[-1] == where and "training 1" in seen:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patched:
        patched.setattr(progress.NodeProgress, "__call__", cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(seed=4, tensorboard=has_tensorboard, **levels)
    resumed = train(seed=4, tensorboard=has_tensorboard, **levels)[0].tensors()
    again = train(seed=4, resume=False, **levels)[0].tensors()
    assert all(torch.equal(resumed[name], again[name]) for name in again)
    assert not all(torch.equal(whole[name], again[name]) for name in again)
    if has_tensorboard:
        (folder,) = folders.loras.glob("tensorboard/patch_adapters_2x-????????")
        figures = shown_in_tensorboard(folder)[0]
        assert list(figures.pop("error/held_out")) == [0, 2, 4]
        assert set(figures) >= {"training/loss", "training/learning_rate", "memory/GiB_peak"}
        assert all(list(curve) == [1, 2, 3, 4] for curve in figures.values()), "one curve, each step once"


def trained_at(monkeypatch, train, **changes):
    """Train, and return the noise levels of all examples, trained and held out, and the adapters."""
    from blockskip_pack.blockskip_core.distillation.examples import Examples

    drawn, batch, held = [], Examples.batch, Examples.held_out_batches

    def seen(self, *args):
        found = batch(self, *args)
        drawn.extend(found.sigmas.tolist())
        return found

    def seen_held_out(self, *args):
        found = held(self, *args)
        drawn.extend(float(one.sigmas) for one in found)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Examples, "batch", seen)
        patched.setattr(Examples, "held_out_batches", seen_held_out)
        return drawn, train(**changes)[0]


@pytest.mark.parametrize(
    ("levels", "coarse", "noted"),
    [
        ({"train_on": "every other step"}, [2, 4], "every other of 6"),
        ({"train_on": "windows", "windows": "1: 2, 5-6: 2"}, [1, 5, 6], "1: 2, 5-6: 2 of 6"),
    ],
    ids=["every other step", "windows"],
)
def test_training_on_the_levels_of_coarse_steps_alone(train, model, monkeypatch, levels, coarse, noted):
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 6).tolist()
    drawn, adapters = trained_at(monkeypatch, train, **levels, planned_steps=6)
    steps = [step for sigma in drawn for step in range(1, 7) if sigmas[step] <= sigma <= sigmas[step - 1]]
    assert len(steps) == len(drawn) == 4 * 2 + 10, "every level is in one step"
    assert sorted(set(steps)) == coarse
    errors = adapters.scales[2].errors
    assert all(any(sigmas[step] < sigma < sigmas[step - 1] for step in coarse) for sigma in errors.sigmas)
    assert adapters.notes["coarse_steps"] == noted


def test_a_pair_counts_the_steps_of_each(train, monkeypatch, model):
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8).tolist()
    given = {"train_on": "windows", "windows": "2: 2", "planned_steps": 8}
    for levels, step in (({"noise_from": sigmas[4] + 0.01}, 1), ({"noise_to": sigmas[4] + 0.01}, 5)):
        drawn, _ = trained_at(monkeypatch, train, **given, **levels)
        assert all(sigmas[step + 1] <= sigma <= sigmas[step] for sigma in drawn)


def test_levels_belong_to_a_run_and_all_of_them_to_the_runs_of_before(train, folders, monkeypatch):
    """A training on all levels has the identity that it had before there was a choice, so its states are found again."""
    from blockskip_pack.blockskip_core.hosts.sampling import patch_training

    parts = []

    def identity(given):
        parts.append(dict(given))
        return real(given)

    real = patch_training.RunIdentity
    monkeypatch.setattr(patch_training, "RunIdentity", identity)
    adapters = [
        train(max_steps=1, **levels)[0]
        for levels in (
            {},
            {"planned_steps": 7, "windows": "2: 2"},
            {"train_on": "every other step", "planned_steps": 7},
        )
    ]
    assert set(parts[0]) == {
        "kind", "version", "model", "captions", "host", "scale", "resize", "latents", "settings", "lora", "checkpointing",
    }  # fmt: skip
    assert parts[1] == parts[0], "what is not used does not matter"
    assert parts[2] == {**parts[0], "coarse_steps": "every other of 7"}
    assert ["coarse_steps" in found.notes for found in adapters] == [False, False, True]


def test_every_other_windows_off_and_budget(trained, use, model, prompt):
    plain = sampled(model, prompt)
    changed, strip, report = use(trained, windows="2-4: 2", sigmas=SIGMAS)
    assert report.startswith("3 of 8 steps coarse: ")
    assert "Patch of every step: 1 2 2 2 1 1 1 1." in report
    assert strip.ndim == 4
    assert not torch.equal(sampled(changed, prompt), plain)
    off, _, report = use(None, mode="off")
    assert off is model
    assert report == "Off: the plain model."
    assert torch.equal(sampled(use(trained, error_budget=0.0)[0], prompt), plain)
    assert re.match(r"[3-6] of 8 steps coarse", use(trained, error_budget=1.0, sigmas=SIGMAS)[2])
    every_other = use(trained, mode="every other", sigmas=SIGMAS)
    assert "Patch of every step: 1 2 1 2 1 2 1 1." in every_other[2]
    typed = use(trained, windows="2: 2, 4: 2, 6: 2")[0]
    assert torch.equal(sampled(every_other[0], prompt), sampled(typed, prompt))
    assert "connect `sigmas` to see them here" in use(trained)[2]
    assert torch.equal(sampled(model, prompt), plain)


@pytest.mark.parametrize(
    ("settings", "planned", "steps"),
    [
        ({"mode": "auto", "tau": 1000.0, "first_own": 0}, "decided while sampling", "1 1 1 1 2 2 2 1"),
        ({"windows": "2-4: 2"}, "3 of 8 steps coarse", "1 2 2 2 1 1 1 1"),
    ],
    ids=["auto", "windows"],
)
def test_the_strip_on_the_node_grows_while_a_sampler_runs(trained, use, prompt, monkeypatch, settings, planned, steps):
    import comfy.utils
    import comfy_execution.progress
    from blockskip_pack.blockskip_core.reporting.pictures import BACKGROUND
    from blockskip_pack.nodes.page import progress

    said, shown = [], []

    def hook(value, total, preview, prompt_id=None, node_id=None):
        if node_id == "1":
            shown.append((value, total, preview[1]))

    monkeypatch.setattr(comfy_execution.progress, "global_progress_registry", None)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(progress.NodeProgress, "say", lambda self, text: said.append(text))
    changed, _, report = use(trained, sigmas=SIGMAS, **settings)
    assert planned in report
    assert shown == []
    sampled(changed, prompt)
    assert re.fullmatch(rf"3 of 8 steps coarse: \d+% of the operations saved\. {steps}", said[-1])
    assert [entry[:2] for entry in shown] == [(done, 8) for done in range(1, 9)]
    own, coarse = (shown[-1][2].getpixel((9 + 40 * steps.split().index(size), 9)) for size in "12")
    assert len({own, coarse, BACKGROUND}) == 3
    for done, _, strip in shown:
        squares = [strip.getpixel((9 + 40 * step, 9)) for step in range(8)]
        made = [own if size == "1" else coarse for size in steps.split()[:done]]
        assert squares == [*made, *[BACKGROUND] * (8 - done)]
    state = comfy_execution.progress.get_progress_state().nodes["1"]["state"]
    assert state is comfy_execution.progress.NodeState.Finished


@pytest.mark.parametrize(("name", "tokens"), [("flux", 64**2), ("flux2", 64**2), ("wan21", 64**2), ("wan22", 32**2)])
def test_the_report_counts_the_models_own_tokens(nodes, run_node, folders, name, tokens):
    """For 1024 px; FLUX.2 and Wan 2.2 5B have 16 px per latent cell, and patches of one and of two cells."""
    family = next(family for family in FAMILIES if family.name == name)
    model, prompts = family.build(), family.captions((5, 5), seed=8)
    settings = {"model": model, "positive": Listed(prompts), **TRAINING, "height": 64, "max_steps": 1}
    adapters = run_node(nodes.TrainPatchAdapters, **settings).args[0]
    used = {"model": model, "patch_adapters": adapters, "mode": "every other", "error_budget": 0.1, "sigmas": SIGMAS}
    report = run_node(nodes.DynamicPatchesNode, **used).args[2]
    assert f"counted for {tokens} image tokens" in report
    assert adapters.notes["image_tokens"] * 256 == tokens, "of a picture with a sixteenth of the side"


def test_clips_of_wan_are_trained_on_and_sampled(nodes, run_node, folders):
    """The model's own clips and given films, decided before and while sampling; own steps are the plain model's."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    wan = next(family for family in FAMILIES if family.name == "wan21")
    model, prompts = wan.build(), wan.captions((5, 5), seed=8)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    clips = {
        "model": model,
        "positive": Listed(prompts),
        **TRAINING,
        "width": 32,
        "height": 64,
        "max_steps": 1,
        "frames": 9,
    }
    films = {
        "images": Listed([torch.rand(9, 70, 40, 3), torch.rand(20, 64, 32, 3)]),
        "vae": FamilyVae(model.model, True),
    }

    def trained(**changes):
        return run_node(nodes.TrainPatchAdapters, **{**clips, **changes}).args[0]

    def sampled(used):
        with torch.inference_mode():
            return SamplerCustom.execute(
                used, True, 7, 1.0, prompts[0], prompts[1], comfy.samplers.sampler_object("euler"), SIGMAS,
                {"samples": torch.zeros(1, 16, 3, 8, 4)},
            ).args[0]["samples"]  # fmt: skip

    own, given = trained(), trained(**films)
    assert [found.notes["image_tokens"] for found in (own, given)] == [3 * 4 * 2] * 2
    assert sum("latents" in name for name in folders.files()) == 1
    plain = sampled(model)
    settings = {"model": model, "patch_adapters": own, "mode": "windows", "error_budget": 0.0, "sigmas": SIGMAS}
    unchanged, _, report = run_node(nodes.DynamicPatchesNode, **settings).args
    assert "counted for 24 image tokens" in report
    assert torch.equal(sampled(unchanged), plain)
    for changes in ({"patch_adapters": given, "windows": "3-5: 2"}, {"mode": "auto", "tau": 1000.0}):
        changed = sampled(run_node(nodes.DynamicPatchesNode, **{**settings, **changes}).args[0])
        assert changed.isfinite().all()
        assert not torch.equal(changed, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    for changes, message in (
        ({"frames": 8}, "`frames` must be a multiple of 4 plus 1 for this model, got 8. Try 5 or 9."),
        ({**films, "frames": 13}, "Film 1 of 2 has 9 pictures, and `frames` asks for clips of 13"),
        (
            {**films, "images": Listed([torch.rand(9, 64, 32, 3), torch.rand(1, 64, 32, 3)])},
            "Film 2 of 2 has 1 pictures",
        ),
        (
            {**films, "images": Listed(films["images"][:1])},
            "There must be one clip for each of the 2 prompts, got 1 clips.",
        ),
    ):
        with pytest.raises(Exception, match=re.escape(message)):
            trained(**changes)


def test_a_pair_of_models_that_share_the_noise_levels(nodes, run_node, folders):
    """Adapters for each of the pair on its own levels, used in one run of two samplers, as of Wan 2.2 14B."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    wan, border = next(family for family in FAMILIES if family.name == "wan21"), 0.5
    prompts, pair = wan.captions((5, 5), seed=8), (wan.build(), wan.build(seed=9))
    films = {"images": Listed(torch.rand(2, 9, 64, 32, 3)), "vae": FamilyVae(pair[0].model, True)}
    sizes = {"width": 32, "height": 64, "max_steps": 1, "frames": 9, "adapters_name": "loras/pair"}

    def trained(model, **levels):
        given = {"model": model, "positive": Listed(prompts), **films, **TRAINING, **sizes, **levels}
        return run_node(nodes.TrainPatchAdapters, **given).args[0]

    adapters = trained(pair[0], noise_from=border), trained(pair[1], noise_to=border)
    for found, low, high in ((adapters[0], border, 1.0), (adapters[1], 0.0, border)):
        errors = found.scales[2].errors
        assert low < errors.sigmas[0] < errors.sigmas[-1] < high
        assert all(error > 0.0 for error in errors.errors)
    assert (adapters[0].notes["noise_from"], adapters[1].notes["noise_to"]) == (border, border)

    def sampled(*windows):
        euler, latent = comfy.samplers.sampler_object("euler"), {"samples": torch.zeros(1, 16, 3, 8, 4)}
        for part, (model, own, window) in enumerate(zip(pair, adapters, windows, strict=True)):
            settings = {
                "model": model,
                "patch_adapters": own,
                "mode": "windows" if window else "off",
                "error_budget": 0.0,
            }
            used = run_node(nodes.DynamicPatchesNode, **settings, windows=window).args[0]
            levels = SIGMAS[4 * part : 4 * part + 5]
            with torch.inference_mode():
                latent = SamplerCustom.execute(
                    used, not part, 7, 1.0, prompts[0], prompts[1], euler, levels, latent
                ).args[0]
        return latent["samples"]

    coarse = [sampled(*windows) for windows in (("", ""), ("2-3: 2", ""), ("", "2-3: 2"), ("2-3: 2", "2-3: 2"))]
    assert all(made.isfinite().all() for made in coarse)
    assert not any(torch.equal(a, b) for k, a in enumerate(coarse) for b in coarse[:k])
    for part, window in ((0, ""), (1, "2-3: 2")):  # nothing of one run stays on the models of the next
        assert torch.equal(sampled("", window), coarse[2 * part])
    with pytest.raises(Exception, match="trained for other weights of a wan"):
        run_node(nodes.DynamicPatchesNode, model=pair[1], patch_adapters=adapters[0], mode="windows", error_budget=0.1)


def test_what_the_nodes_refuse(nodes, train, trained, use, run_node, model, prompt, folders, tiny, vae):
    from blockskip_pack.blockskip_core.errors import BlockSkipError

    cases = [
        (lambda: use(None), "No patch adapters came in"),
        (lambda: use(trained, mode="fast"), "mode must be one of every other, windows, auto, off"),
        (lambda: use(trained, error_budget=2.0), "error_budget must be between 0 and 1"),
        (lambda: use(trained, mode="auto", tau=0.0), "tau must be positive"),
        (lambda: use("no"), "must be patch adapters, from Load Patch Adapters"),
        (lambda: use(trained, model=tiny.tiny_flux(seed=5)), "trained for other weights of a flux model"),
        (lambda: train(positive=Listed([prompt])), "At least 2 prompts are needed"),
        (lambda: train(width=72), "width and height must be multiples of 32 px"),
        (lambda: train(cfg=2.0), "but no negative came in"),
        (lambda: train(images=torch.rand(2, 64, 64, 3)), "images came in, but no VAE"),
        (lambda: train(images=torch.rand(2, 64, 64, 3), vae=vae), "one picture for each of the 3 prompts, got 2"),
        (lambda: train(patch_sizes="3x"), "patch_sizes must be one of"),
        (lambda: train(noise_from=0.5, noise_to=0.5), "must be a range within 0 to 1, got 0.5 to 0.5"),
        (lambda: train(train_on="some"), "train_on must be one of all levels, every other step, windows, got 'some'"),
        (lambda: train(train_on="windows", windows="2..4"), "Windows are written like"),
        (lambda: train(train_on="windows", windows="19-21: 2"), "not within the steps 1 to 20"),
        (lambda: train(train_on="windows"), "nothing to train patches of 2x on"),
        (
            lambda: train(train_on="every other step", planned_steps=2),
            "every other of 2, none has patches of this size",
        ),
        (lambda: train(train_on="every other step", planned_steps=0), "needs at least 1 step, got 0"),
        (lambda: train(frames=5), "`frames` is 5, but this model makes pictures. Set it to 1."),
        (lambda: train(adapters_name="../x"), "must stay inside ComfyUI's output folder"),
        (lambda: run_node(nodes.LoadPatchAdapters, file="none"), "No file was chosen"),
        (lambda: run_node(nodes.LoadPatchAdapters, file="other.safetensors"), "There is no 'other.safetensors'"),
    ]
    for call, message in cases:
        with pytest.raises(BlockSkipError, match=re.escape(message)):
            call()
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folders.loras / "lora.safetensors")
    (folders.loras / "broken.safetensors").write_bytes(b"1234")
    for file, message in (("lora", "holds no patch adapters"), ("broken", "cannot be read. It may be damaged")):
        with pytest.raises(BlockSkipError, match=message):
            run_node(nodes.LoadPatchAdapters, file=f"{file}.safetensors")

"""Every ComfyUI node that changes a MODEL, connected before our nodes: left out, followed, or refused in one sentence.

The outcomes are recorded in ``tests/compatibility/model_nodes.json``, which docs/compatibility.md shows. A node that is
not recorded fails, because a new ComfyUI may add nodes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..compatibility.recorded import FOLDER, assert_recorded
from .conftest import MANUAL, PATCHES, TRAINING
from .host_nodes import AFTER, NO_INPUTS, ONLY_FOR, applied, hypernetwork, model_patch, nodes_on_a_model

RECORDED = "model_nodes.json"
COLUMNS = ("Node", "Training", "RALU Sampler")
NAMES = [row[0] for row in json.loads((FOLDER / RECORDED).read_text(encoding="utf-8"))["rows"]]
SMALL = {"samples": torch.zeros(1, 4, 8, 12)}
EXAMPLES = {**PATCHES, "draws": 2}
STEPS = {**TRAINING, "steps": 2}
RALU = {
    "seed": 7,
    "cfg": 3.0,
    "preset": "custom",
    "custom_steps": "2, 2, 2",
    "upsample_ratio": 0.34,
    "regions": "edges",
}
CACHES = ("EasyCache", "LazyCache")  # they need steps that can be skipped
LOG = "blockskip_pack.blockskip_core.hosts.models.patches"


def is_the_newest_host(comfyui) -> bool:
    return importlib.import_module("comfyui_version").__version__ == "0.30.0"


@pytest.fixture(autouse=True)
def _newest(comfyui):
    if not is_the_newest_host(comfyui):
        pytest.skip("the table is for ComfyUI 0.30.0")


@pytest.fixture(scope="module")
def world(comfyui, nodes, tiny, tmp_path_factory):
    """Models and conditionings; results for a plain MODEL are computed once."""
    return SimpleNamespace(
        model=tiny.tiny_flux(), other=tiny.tiny_flux(seed=1), prompt=tiny.captions((5,))[0],
        negative=tiny.captions((5,), seed=3)[0], plain={},
    )  # fmt: skip


@pytest.fixture
def sockets(world, vae, folders, monkeypatch):
    """The nodes' inputs; files are where ComfyUI looks for them."""
    import folder_paths
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(4)
    name = "diffusion_model.double_blocks.1.img_attn.proj"
    lora = {f"{name}.{half}.weight": torch.randn(shape, generator=generator) * 0.1
            for half, shape in (("lora_A", (2, 64)), ("lora_B", (64, 2)))}  # fmt: skip
    save_file(lora, folders.loras / "tiny.safetensors")
    hypernetworks = folders.temp / "hypernetworks"
    hypernetworks.mkdir()
    torch.save(hypernetwork(32), hypernetworks / "tiny.pt")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "hypernetworks", ([str(hypernetworks)], {".pt"}))
    hidden = torch.randn(1, 30, 4, 8, generator=generator)
    return {
        "model2": world.other, "CONDITIONING": world.negative, "VAE": vae, "IMAGE": torch.ones(1, 64, 96, 3) / 2,
        "MASK": torch.ones(1, 64, 96), "CLIP": None, "LATENT": SMALL, "LATENT_OPERATION": lambda latent, **_: 0.9 * latent,
        "MODEL_PATCH": model_patch(), "LORA_MODEL": lora, "lora_name": "tiny.safetensors", "hypernetwork_name": "tiny.pt",
        "CLIP_VISION_OUTPUT": SimpleNamespace(all_hidden_states=hidden, penultimate_hidden_states=hidden[:, -2]),
    }  # fmt: skip


@pytest.fixture
def training(nodes, run_node, world, vae, pictures):
    """Select, precompute and train on a MODEL; return the losses and the LoRA."""

    def train(model: Any) -> dict[str, torch.Tensor]:
        selection = run_node(nodes.SelectBlocks, model=model, positive=world.prompt, **MANUAL)[0]
        residuals = run_node(
            nodes.PrecomputeResiduals, model=model, vae=vae, images=pictures, positive=world.prompt, selection=selection,
            **EXAMPLES,
        )[0]  # fmt: skip
        lora, loss = run_node(nodes.TrainLora, model=model, residuals=residuals, **STEPS).args[:2]
        return {**lora, "loss": torch.tensor(loss["loss"])}

    return train


@pytest.fixture
def ralu(nodes, run_node, world, vae):
    """Sample from a MODEL in three stages."""

    def sample(model: Any, **changes: Any) -> dict[str, torch.Tensor]:
        settings = {**RALU, **changes}
        found = run_node(
            nodes.RaluSampler, model=model, positive=world.prompt, negative=world.negative, vae=vae, latent_image=SMALL,
            **settings,
        )  # fmt: skip
        return {"latent": found[0]["samples"]}

    return sample


@pytest.fixture
def _not_compiled():
    """Compiled modules run uncompiled, which is faster here, but they are in the same places."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def on(world, sockets, _not_compiled):
    """Apply a node to the MODEL and return (the MODEL before it, its output)."""

    def put(name: str) -> tuple[Any, Any]:
        first = AFTER.get(name)
        before = applied(first, world.model, sockets) if first else world.model
        return before, applied(name, before, sockets)

    return put


def plainly(world, kind: str, job, before: Any) -> dict[str, torch.Tensor]:
    """Return a job's result without the node; it is run only once."""
    key = kind, None if before is world.model else id(before)
    if key not in world.plain:
        world.plain[key] = job(before), before  # kept, so that its id is not reused
    return world.plain[key][0]


def reason_of(sentence: str) -> str:
    """Return the reason for a refusal; the message must say what was received and what to do."""
    parts = re.fullmatch(r"[^.]+ cannot follow (.+) on the MODEL, got [^.]+\. ([^.]+\.)+", sentence)
    assert parts, sentence
    return parts[1]


def outcome(world, job, model: Any, plain: dict[str, torch.Tensor]) -> str:
    """Return a node's outcome: why it is refused, or whether it changes anything."""
    from blockskip_pack.blockskip_core.errors import BlockSkipError

    try:
        found = job(model)
    except BlockSkipError as error:
        return f"refused: {reason_of(str(error))}"
    except (AttributeError, TypeError) as error:
        with pytest.raises(type(error)):
            core_s_euler(model, world)
        return "fails in ComfyUI's own sampler too"
    assert found.keys() == plain.keys()
    assert all(bool(value.isfinite().all()) for value in found.values())
    return "no effect" if all(torch.equal(found[name], plain[name]) for name in plain) else "followed"


def host_s_answer(model: Any, prompt: list, noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the clean estimate that a ComfyUI sampler gets from a MODEL with all its changes."""
    import comfy.sample
    import comfy.samplers

    seen: list[torch.Tensor] = []

    class OneCall(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *_others):
            seen.append(model_wrap(noisy, sigmas[:1], **extra_args))
            return noisy

    sigmas = torch.tensor([sigma, 0.0])
    comfy.sample.sample_custom(model, noisy, 1.0, OneCall(), sigmas, prompt, prompt, noisy, disable_pbar=True, seed=0)
    return seen[0]


def assert_followed_as_the_host_does(model: Any, prompt: list) -> None:
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    noisy, sigma = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(6)), 0.6
    dit = HostedDit(model, [prompt], (4, 8, 12))
    with torch.inference_mode():
        expected = host_s_answer(model, prompt, noisy, sigma)
        with dit.running({}) as denoise:
            torch.testing.assert_close(denoise(noisy, torch.tensor([sigma]), [0]), expected, rtol=1e-4, atol=1e-5)


def test_every_node_of_the_host_is_in_the_table(world):
    found = {*nodes_on_a_model()}
    if os.environ.get("BLOCKSKIP_RECORD"):
        for name in sorted(found - {*NAMES}):
            assert_recorded(RECORDED, COLUMNS, [name, "?", "?"])
    assert {*NAMES} == found, "run it with BLOCKSKIP_RECORD=1, and once more"
    assert {*ONLY_FOR, *NO_INPUTS, *AFTER} <= found


@pytest.mark.parametrize("name", NAMES)
def test_a_node_in_front_of_training_and_of_ralu(name, world, on, sockets, training, ralu, vae, folders, caplog):
    if name in NO_INPUTS:
        assert_recorded(RECORDED, COLUMNS, [name, *[f"not run: needs {NO_INPUTS[name]}"] * 2])
        return
    if name in ONLY_FOR:
        with pytest.raises((AttributeError, KeyError, ValueError)):
            on(name)
        assert_recorded(RECORDED, COLUMNS, [name, *[f"not run: only for {ONLY_FOR[name]}"] * 2])
        return
    before, model = on(name)
    plain = plainly(world, "training", training, before)
    caplog.clear()
    encoded, files = vae.encoded, folders.files()
    of_training = outcome(world, training, model, plain)
    lines = [record.getMessage() for record in caplog.records if record.name == LOG]
    if lines:
        assert len(lines) == 3, "one for each of our nodes"
        of_training = {"no effect": "left out", "followed": "followed in part"}[of_training]
    elif of_training.startswith("refused"):
        assert (vae.encoded, folders.files()) == (encoded, files), "before any work"
    if of_training.startswith("followed"):
        assert_followed_as_the_host_does(model, world.prompt)

    sample = partial(ralu, custom_steps="4, 4, 4") if name in CACHES else ralu
    of_ralu = outcome(world, sample, model, plainly(world, "longer" if name in CACHES else "ralu", sample, before))
    if of_ralu == "followed" and name not in CACHES:  # caches compare consecutive steps, and a stage has fewer steps
        one_stage = {"custom_steps": "3", "custom_ends": "1"}
        torch.testing.assert_close(ralu(model, **one_stage)["latent"], core_s_euler(model, world), rtol=1e-4, atol=1e-4)
    assert_recorded(RECORDED, COLUMNS, [name, of_training, of_ralu])


EVERY_NODE = ("select", "measure", "plan", "precompute", "train", "train with samples")


@pytest.fixture
def every_node(nodes, run_node, world, vae, pictures):
    """Each of our nodes that takes a MODEL to train on: name -> its outputs for a MODEL, except its summary."""
    selection = run_node(nodes.SelectBlocks, model=world.model, positive=world.prompt, **MANUAL)[0]
    common = {"positive": world.prompt, "selection": selection}
    examples = {"vae": vae, "images": pictures, **common, **EXAMPLES}
    residuals = run_node(nodes.PrecomputeResiduals, model=world.model, **examples)[0]
    plan = {name: entry.default for entry in nodes.MemoryPlan.GET_SCHEMA().inputs
            if (name := entry.id) not in ("model", "positive", "selection", "references")} | {"patch_min": 32, "probe_size": 64, "draws": 2, "use_spare": False}  # fmt: skip
    samples = run_node(
        nodes.SampleWhileTraining, positive=world.prompt, vae=vae, every=2, at_start=False, width=64, height=64,
        sampler_steps=1, cfg=1.0, scheduler="simple", seed=1,
    )[0]  # fmt: skip
    measure = {"method": "attention mask", "skip_ratio": 0.2, "front": 0, "back": 0, "probe_size": 64, "probe_steps": 1}

    def call(name: str, model: Any) -> Any:
        return {
            "select": lambda: run_node(nodes.SelectBlocks, model=model, positive=world.prompt, **MANUAL)[2],
            "measure": lambda: run_node(nodes.SelectBlocks, model=model, positive=world.prompt, **measure)[2],
            "plan": lambda: run_node(nodes.MemoryPlan, model=model, **common, **plan).args[1],
            "precompute": lambda: run_node(nodes.PrecomputeResiduals, model=model, **examples)[0].identity,
            "train": lambda: run_node(nodes.TrainLora, model=model, residuals=residuals, **STEPS)[1],
            "train with samples": lambda: run_node(
                nodes.TrainLora, model=model, residuals=residuals, samples=samples, **STEPS
            )[1],
        }[name]()  # fmt: skip

    return call


@pytest.mark.parametrize("name", EVERY_NODE)
def test_all_our_nodes_follow_the_same_list(name, every_node, world, on, caplog):
    from blockskip_pack.blockskip_core.errors import UnsupportedModelError

    expected = every_node(name, world.model)
    caplog.clear()
    assert every_node(name, on("EasyCache")[1]) == expected
    lines = [record.getMessage() for record in caplog.records if record.name == LOG]
    assert lines == ["BlockSkip: left out of training, because it belongs to sampling: easycache"]
    with pytest.raises(
        UnsupportedModelError, match="Training cannot follow a ControlNet or another model in its blocks"
    ):
        every_node(name, on("USOStyleReference")[1])


def core_s_euler(model: Any, world) -> torch.Tensor:
    """Return SamplerCustom's output with the steps of RALU in one stage."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    shifted = [3.0 * u / (1.0 + 2.0 * u) for u in (1.0, 2 / 3, 1 / 3, 0.0)]
    with torch.inference_mode():
        return SamplerCustom.execute(
            model, True, RALU["seed"], RALU["cfg"], world.prompt, world.negative, comfy.samplers.sampler_object("euler"),
            torch.FloatTensor(shifted), SMALL,
        ).args[0]["samples"]  # fmt: skip

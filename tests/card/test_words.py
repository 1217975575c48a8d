"""A word learned on a card is the one learned on the CPU; both models together or one after the other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..device import devtools
from ..hosts.small_clips import small_clip
from ..hosts.tiny_flux import tiny_flux, weights
from ..nodes.conftest import TinyVae
from .modes import MODES
from .runs import on_cpu

SETTINGS = {
    "captions": "a photo of {word} on grass", "like_word": "dog", "name": "word", "steps": 4, "seed": 3, "resolution": 64,
    "directions": 3, "check_perturbation": False, "resume": False,
}  # fmt: skip


@pytest.fixture
def embeddings(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An embeddings folder only for the test."""
    import folder_paths

    folder = tmp_path / "embeddings"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def learn(runs: Any, embeddings: Any) -> Any:
    """Learn a word and return its vectors."""

    def call(model: Any, clip: Any, **changes: Any) -> dict[str, torch.Tensor]:
        given = {"model": model, "clip": clip, "vae": TinyVae(), "images": runs.pictures, **SETTINGS, **changes}
        word = runs.call("TrainWord", **given)[0]
        return load_file(embeddings / f"{word.removeprefix('embedding:')}.safetensors")

    return call


def clip_on(device: torch.device, folder: Any) -> Any:
    """Return a CLIP of FLUX.1 that ComfyUI loads to a device."""
    clip = small_clip.__wrapped__("FLUX.1", str(folder))
    clip.patcher.load_device = device
    return clip


def clip_on_card(folder: Any) -> Any:
    """Return one that ComfyUI loads to the card, as it does unless the card is small."""
    import comfy.model_management

    return clip_on(comfy.model_management.get_torch_device(), folder)


@pytest.mark.parametrize(
    ("mode", "residency"),
    [("resident", "together"), ("resident", "in turns"), ("streamed", "together"), ("few_pages", "in turns")],
)
def test_it_is_the_word_of_the_cpu(card, learn, embeddings, mode, residency):
    expected = learn(on_cpu(tiny_flux()), clip_on(torch.device("cpu"), embeddings))
    model, clip = tiny_flux(), clip_on_card(embeddings)
    before = weights(model), weights(clip.patcher)
    with MODES[mode](card, model) as treated:
        found = learn(treated, clip, residency=residency)
        devtools("card.comfyui").forget_models()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)
    for patcher, kept in zip((model, clip.patcher), before, strict=True):
        now = patcher.model.state_dict()
        assert all(torch.equal(now[name].cpu(), tensor) for name, tensor in kept.items())


def test_it_tells_what_it_needs_before_the_first_step(card, runs, embeddings):
    given = {
        "model": tiny_flux(),
        "clip": clip_on_card(embeddings),
        "vae": TinyVae(),
        "images": runs.pictures,
        **SETTINGS,
    }
    report = runs.call("TrainWord", **given)[4]
    (told,) = [line for line in report.splitlines() if line.startswith("Counted before the first step: ")]
    assert re.search(r"[\d.]+ MiB with text encoder and model loaded together, [\d.]+ MiB in turns", told)
    assert told.endswith(" free.")


@pytest.mark.parametrize(("residency", "loaded"), [("together", 2), ("in turns", 1)])
def test_one_after_the_other_means_that_only_one_is_loaded(card, learn, embeddings, monkeypatch, residency, loaded):
    import comfy.model_management
    import comfy.samplers

    seen, run = [], comfy.samplers.calc_cond_batch

    def watching(model: Any, conds: Any, noisy: torch.Tensor, *others: Any) -> Any:
        if not noisy.is_meta:  # the memory was counted before, without weights
            seen.append(len(comfy.model_management.current_loaded_models))
        return run(model, conds, noisy, *others)

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", watching)
    learn(tiny_flux(), clip_on_card(embeddings), residency=residency)
    assert seen == [loaded] * 4

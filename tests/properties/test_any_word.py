"""Train Word with any input: it succeeds or explains in one sentence why not, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..hosts.small_clips import small_clip
from . import strategies
from .test_any_input import examples, holds, world  # noqa: F401  a fixture is used by being there

FAST = {
    "captions": "a {word}", "like_word": "dog", "name": "word", "steps": 1, "seed": 3, "resolution": 64, "directions": 2,
    "check_perturbation": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def taught(world):  # noqa: F811
    """The same world with a text encoder and an embeddings folder below ComfyUI's output, which may change."""
    import folder_paths

    folder = world.base / "output" / "embeddings"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(folder)], {".safetensors"}))
        world.clip = small_clip.__wrapped__("FLUX.1", str(folder))
        yield world


@examples(50)
@given(data=st.data())
def test_train_word(taught, data):
    node = taught.nodes.TrainWord
    usual = {name: st.just(value) for name, value in FAST.items()} | {
        "directions": st.integers(2, 3), "seed": st.integers(0, 2**64 - 1), "noise_from": st.floats(0.0, 0.4),
        "noise_to": st.floats(0.5, 1.0), "fixed_examples": st.integers(0, 5), "step_size": st.floats(0.001, 10.0),
        "perturbation": st.floats(0.0001, 10.0), "subspace_every": st.sampled_from([0, 2, 5]), "save_every": st.integers(0, 2),
    }  # fmt: skip
    inputs = {
        "model": strategies.socket(taught.model),
        "clip": strategies.socket(taught.clip),
        "vae": strategies.socket(taught.vae),
        "images": strategies.pictures(),
        **strategies.widgets(node, usual),
    }
    values = {"check_perturbation": False, "resolution": 64, **strategies.drawn(data, inputs)}
    if isinstance(values["resolution"], int) and 64 < values["resolution"] <= 4096:
        values["resolution"] = 64  # allowed, and slow
    if isinstance(values.get("steps"), int) and values["steps"] > 5:
        values["steps"] = 2
    holds(taught, node, **values)
    assert "load_model" not in vars(taught.clip)


@examples(30)
@given(name=strategies.NAMES, absolute=st.booleans())
def test_a_words_name_reaches_no_other_folder(taught, name, absolute):
    """Absolute names point to a watched folder outside ComfyUI's."""
    name = f"{taught.sandbox}/beside/{name}" if absolute else name
    inputs = {"model": taught.model, "clip": taught.clip, "vae": taught.vae, "images": torch.rand(1, 64, 64, 3)}
    outcome = holds(taught, taught.nodes.TrainWord, **inputs, **{**FAST, "name": name})
    assert not absolute or outcome == "InvalidInputError"


@examples(20)
@given(captions=st.text(max_size=60) | st.builds("{} {{word}} {}".format, st.text(max_size=20), st.text(max_size=20)),
       like=st.text(max_size=30) | strategies.NAMES)  # fmt: skip
def test_any_caption_and_any_known_word(taught, captions, like):
    inputs = {"model": taught.model, "clip": taught.clip, "vae": taught.vae, "images": torch.rand(1, 64, 64, 3)}
    holds(taught, taught.nodes.TrainWord, **inputs, **{**FAST, "captions": captions, "like_word": like})

"""The demo's files in ComfyUI's loader nodes: recognised, usable, small, and with clear messages when damaged."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"
LIMIT = 24_000_000  # bytes


@pytest.fixture
def folders(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders with copies of the demo's files."""
    import folder_paths

    shutil.copytree(ASSETS, tmp_path / "models")
    for kind in ("diffusion_models", "vae", "text_encoders"):
        entry = ([str(tmp_path / "models")], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "models"


@pytest.fixture(scope="module")
def loaded(comfyui: Path) -> SimpleNamespace:
    """MODEL, VAE and CLIP from the loader nodes, and the reader; all loaded once."""
    import folder_paths

    import nodes

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ASSETS.parent))
        for kind in ("diffusion_models", "vae", "text_encoders"):
            patch.setitem(folder_paths.folder_names_and_paths, kind, ([str(ASSETS)], {".safetensors"}))
        patch.setattr(folder_paths, "filename_list_cache", {})
        names, encoders, readers = map(importlib.import_module, ("host", "blockskip_demo_nodes", "world_reader"))
        return SimpleNamespace(
            model=nodes.UNETLoader().load_unet(names.DIT_FILE, "default")[0],
            vae=nodes.VAELoader().load_vae(names.VAE_FILE)[0],
            clip=encoders.LoadTextEncoder().load(names.TEXT_FILE)[0],
            reader=readers.load_reader(ASSETS / names.READER_FILE),
        )


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= LIMIT


def test_the_other_transformer_has_the_same_layout_and_other_weights(loaded: SimpleNamespace) -> None:
    from safetensors.torch import load_file

    names = importlib.import_module("host")
    scenes, views = (load_file(ASSETS / file) for file in names.DITS.values())
    assert {key: tensor.shape for key, tensor in views.items()} == {key: x.shape for key, x in scenes.items()}
    assert not any(torch.equal(views[key], scenes[key]) for key in views if key.endswith("linear1.weight"))


def test_model_is_recognised_as_flux_schnell(loaded: SimpleNamespace) -> None:
    import comfy.supported_models

    assert isinstance(loaded.model.model.model_config, comfy.supported_models.FluxSchnell)
    flux = loaded.model.model.diffusion_model
    assert (len(flux.double_blocks), len(flux.single_blocks)) == (4, 8)
    assert flux.hidden_size // flux.num_heads == 128


def test_vae_gives_back_what_it_is_given(loaded: SimpleNamespace, world: ModuleType) -> None:
    import numpy as np

    drawn = [world.render(world.subject_scenes(name, 1, 0)[0], 128) for name in world.SUBJECTS]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).float() / 255
    latents = loaded.vae.encode(pixels)
    assert latents.shape == (len(drawn), 16, 16, 16)
    assert (loaded.vae.decode(latents) - pixels).abs().mean() < 0.04


def test_sampled_pictures_read_back_as_their_captions(loaded: SimpleNamespace, world: ModuleType, demo) -> None:
    scenes = [world.Scene("circle", "red", "big", "plain", "grass", "left"),
              world.Scene("square", "blue", "big", "plain", "sand", "right")]  # fmt: skip
    options = SimpleNamespace(steps=12, cfg=3.0)
    parts = (loaded.model, loaded.clip, loaded.vae)
    texts = [world.caption(scene) for scene in scenes]
    sampled = demo("evaluate_world").sample_batch(parts, texts, (128, 128), options, seed=1)
    read = demo("world_reader").read(loaded.reader, sampled)
    for scene, answers in zip(scenes, read, strict=True):
        for question in ("colour", "ground", "place"):
            assert answers[question] == getattr(scene, question)


def test_reader_is_right_about_drawn_pictures(loaded: SimpleNamespace, demo) -> None:
    shares = demo("train_reader").accuracy(loaded.reader, 500, "another seed")
    assert min(shares.values()) >= 0.98, shares


def test_reader_tells_a_subject_from_its_kind(loaded: SimpleNamespace, world: ModuleType, demo) -> None:
    import numpy as np

    def tensor(scene: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(world.render(scene, 128)).copy()).permute(2, 0, 1)[None].float() / 255

    toby, again = (tensor(world.SubjectScene("toby", "water", "left", seed)) for seed in (1, 2))
    kind = tensor(world.Scene("circle", "orange", "big", "plain", "water", "left", 1))
    similarity = demo("world_reader").similarity
    assert similarity(loaded.reader, toby, again).item() > 0.9
    assert similarity(loaded.reader, toby, kind).item() < 0.6


@pytest.mark.parametrize("text", ["a big red dog on grass, left", "toby on mars"])
def test_an_unknown_word_is_named_with_the_known_ones(loaded: SimpleNamespace, text: str) -> None:
    with pytest.raises(ValueError, match=r"does not know '(dog|mars)'; it knows commas and these words: a, on, small"):
        loaded.clip.tokenize(text)


def test_a_long_caption_is_refused(loaded: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="at most 16 words and commas, not 20"):
        loaded.clip.tokenize("red " * 20)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:300]), lambda path: path.unlink()])
def test_a_damaged_or_missing_text_file_is_named(folders: Path, demo, spoil) -> None:
    names = demo("host")
    spoil(folders / names.TEXT_FILE)
    with pytest.raises(ValueError, match=f"{names.TEXT_FILE} cannot be read .* Copy it again"):
        demo("blockskip_demo_nodes").load_text_encoder(str(folders / names.TEXT_FILE))


def test_another_file_is_not_taken_for_the_text_file(folders: Path, demo) -> None:
    names = demo("host")
    with pytest.raises(ValueError, match="is not a text file of the BlockSkip demo world"):
        demo("blockskip_demo_nodes").load_text_encoder(str(folders / names.VAE_FILE))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "cannot be read .* Make it with train_reader.py"),
        (lambda path: path.write_bytes(b"nothing"), "cannot be read .* Make it with train_reader.py"),
        (lambda path: shutil.copy(path.parent / "blockskip_world_text.safetensors", path), "is not the world's reader"),
    ],
)
def test_a_damaged_reader_is_named(folders: Path, demo, spoil, sentence: str) -> None:
    path = folders / demo("host").READER_FILE
    spoil(path)
    with pytest.raises(ValueError, match=sentence):
        demo("world_reader").load_reader(path)

"""A trigger word in every caption, and mirrored copies."""

from __future__ import annotations

import importlib

import pytest
import torch

ROOM = "blockskip_pack.blockskip_core.hosts.inputs"


@pytest.fixture
def variants(comfyui):
    """The module; it imports the host's, which need the settings of the fixture."""
    return importlib.import_module(f"{ROOM}.folder_variants")


@pytest.fixture
def loaded(variants):
    def make(*texts):
        files = [variants.TrainingFile(f"{number}.png", text) for number, text in enumerate(texts)]
        return variants.LoadedFolder([torch.rand(1, 3, 4, 3) for _ in texts], list(texts), files, ["odd"])

    return make


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("on a table", "sks toy, on a table"),
        ("", "sks toy"),
        ("a photo of sks toy on a table", "a photo of sks toy on a table"),
        ("SKS toy, red", "SKS toy, red"),
        ("sks toys", "sks toy, sks toys"),
        ("masks toy", "sks toy, masks toy"),
    ],
)
def test_the_word_comes_once(variants, loaded, caption, expected):
    found = variants.with_trigger(loaded(caption), "  sks   toy ")
    assert found.texts == [expected]
    assert found.files == [variants.TrainingFile("0.png", expected)]
    assert found.remarks == ["odd"]


def test_signs_in_the_word_are_no_pattern(variants, loaded):
    assert variants.with_trigger(loaded("a.b", "axb"), "a.b").texts == ["a.b", "a.b, axb"]


@pytest.mark.parametrize("word", ["", "  \n"])
def test_an_empty_word_changes_nothing(variants, loaded, word):
    folder = loaded("a", "")
    assert variants.with_trigger(folder, word) is folder


def test_mirrored_copies_follow_their_pictures(variants, loaded):
    folder = loaded("a", "b")
    found = variants.with_mirrored(folder)
    assert found.texts == ["a", "a", "b", "b"]
    assert [file.name for file in found.files] == ["0.png", "0.png (mirrored)", "1.png", "1.png (mirrored)"]
    for place, image in enumerate(folder.images):
        assert found.images[2 * place] is image
        assert torch.equal(found.images[2 * place + 1][0, :, 0], image[0, :, -1])
        assert torch.equal(found.images[2 * place + 1].flip(2), image)

"""Captions of any nesting and dtype come back bit for bit, with equal identity; anything else is refused."""

from __future__ import annotations

import json

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.runs.packing import Material, read_material, write_material
from safetensors import safe_open
from safetensors.torch import save_file


def test_a_round_trip(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    captions = [
        [[torch.randn(1, 3, 4).to(torch.bfloat16), {"pooled_output": shared.T, "guidance": 3.5, "none": None, "deep": {"a": [1, "b"]}}]],
        [[shared, {"mask": torch.tensor([True, False]), "again": shared}]],
    ]  # fmt: skip
    given = Material(torch.randn(2, 4, 8, 8), captions, {"x.lora_up.weight": torch.ones(2, 1)})
    path = tmp_path / "a.safetensors"
    found = read_material(path, write_material(given, path))
    assert torch.equal(found.latents, given.latents)
    assert found.start.keys() == given.start.keys()
    (text, settings), (second, more) = found.captions[0][0], found.captions[1][0]
    assert text.dtype == torch.bfloat16
    assert torch.equal(text, captions[0][0][0])
    assert torch.equal(settings.pop("pooled_output"), shared.T)
    assert settings == {"guidance": 3.5, "none": None, "deep": {"a": [1, "b"]}}
    assert torch.equal(second, more["again"])
    assert more["mask"].dtype == torch.bool


def test_latents_of_several_shapes_come_back_one_by_one(tmp_path):
    path, latents = tmp_path / "a.safetensors", [torch.randn(4, 2 + n % 3, 8) for n in range(12)]
    found = read_material(path, write_material(Material(latents, [[]]), path)).latents
    assert all(torch.equal(a, b) for a, b in zip(found, latents, strict=True))


def test_what_captions_share_is_stored_once(tmp_path):
    text, path = torch.randn(1, 3, 4), tmp_path / "a.safetensors"
    captions = [[[text, {"pooled_output": text, "reference_latents": [torch.full((1,), float(n))]}]] for n in range(3)]
    found = read_material(path, write_material(Material(torch.zeros(3, 1, 1, 1), captions), path)).captions
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == 1 + 1 + 3
    assert len({id(caption[0][0]) for caption in found}) == 1
    assert found[2][0][1]["pooled_output"] is found[0][0][0]
    assert [caption[0][1]["reference_latents"][0].item() for caption in found] == [0.0, 1.0, 2.0]


def test_files_with_a_tensor_for_each_place_are_read(tmp_path):
    from blockskip_pack.blockskip_core.files import content_hash

    path = tmp_path / "a.safetensors"
    names = ["caption/0/0/0", "caption/1/0/0"]
    packed = ["list", [["list", [["list", [["tensor", name], ["dict", {}]]]]] for name in names]]
    tensors = {"latents": torch.zeros(2, 1, 1, 1), **{name: torch.ones(1) for name in names}}
    save_file(tensors, path, {"captions": json.dumps(packed)})
    found = read_material(path, content_hash(path)).captions
    assert [caption[0][0].item() for caption in found] == [1.0, 1.0]


def test_what_a_file_cannot_keep(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InvalidInputError, match=r"A caption holds a function \(caption/0/0/1/hook\)"):
        write_material(Material(torch.zeros(1, 1, 1, 1), [[[torch.zeros(1), {"hook": lambda: 0}]]]), path)
    assert not path.exists()


@pytest.mark.parametrize(
    "packed",
    ["x", ["tensor", "gone"], ["code", "x"], ["value", [1]], ["list", {"a": 1}], ["dict", [1]], ["list", 3], None, []],
)
def test_content_that_nobody_wrote(tmp_path, packed):
    from blockskip_pack.blockskip_core.files import content_hash

    path = tmp_path / "a.safetensors"
    save_file({"latents": torch.zeros(1)}, path, {"captions": json.dumps(packed)})
    with safe_open(path, "pt"), pytest.raises(InvalidInputError, match="a.safetensors cannot be read"):
        read_material(path, content_hash(path))

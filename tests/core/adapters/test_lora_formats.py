"""LoRA tensors and metadata in files."""

import json

import pytest
import torch
from blockskip_pack.blockskip_core.adapters.lora_formats import (
    metadata_from_strings,
    metadata_to_strings,
    to_file_tensors,
    to_host_lora,
)

from .test_lora import LAYERS, RANK, SCALE, adapters


def delta_of_the_host(tensors, up, down, alpha):
    """The host's rule: up @ down * alpha / rank, with alpha = rank where the file has none."""
    rank = tensors[down].shape[0]
    return tensors[up] @ tensors[down] * (tensors[alpha].item() / rank if alpha in tensors else 1.0)


def test_every_written_form_is_the_same_change_of_the_weights():
    lora = adapters()
    state = lora.state_dict()
    host = to_host_lora(state, lora.scale, RANK)
    kohya = to_file_tensors(state, lora.scale, RANK, "kohya")
    native = to_file_tensors(state, lora.scale, RANK, "peft")
    for name in LAYERS:
        expected = SCALE * lora.up(name).detach() @ lora.down(name).detach()
        d, k = f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")
        deltas = [
            delta_of_the_host(host, f"{d}.lora_up.weight", f"{d}.lora_down.weight", f"{d}.alpha"),
            delta_of_the_host(kohya, f"{k}.lora_up.weight", f"{k}.lora_down.weight", f"{k}.alpha"),
            delta_of_the_host(native, f"{d}.lora_B.weight", f"{d}.lora_A.weight", f"{d}.alpha"),
        ]
        for delta in deltas:
            torch.testing.assert_close(delta, expected, atol=1e-12, rtol=0.0)
        assert host[f"{d}.alpha"].item() == 1.0  # the host's "existing LoRA" input takes it to be 1
    assert len(host) == len(kohya) == 3 * len(LAYERS)
    assert len(native) == 2 * len(LAYERS)


def test_written_tensors_share_no_memory_with_the_training():
    lora = adapters()
    for tensors in (lora.state_dict(), to_host_lora(lora.state_dict(), 1.0, RANK)):
        pointers = {tensor.data_ptr() for tensor in tensors.values()}
        assert pointers.isdisjoint(p.data_ptr() for p in lora.parameters())


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"steps": 3, "loss": 0.5, "nested": {"a": [1, None, True]}},
        {"caption": 'ünï"\\\n\x00\u2028</script>', "": "x"},
    ],
)
def test_metadata_survives_its_strings(metadata):
    strings = metadata_to_strings(metadata)
    assert all(isinstance(text, str) for pair in strings.items() for text in pair)
    assert metadata_from_strings(strings) == metadata


@pytest.mark.parametrize(
    "strings",
    [None, {}, {"format": "pt"}, {"blockskip": ""}, {"blockskip": "{"}, {"blockskip": "[1]"}, {"blockskip": "null"},
     {"blockskip": '"text"'}, {"blockskip": "__import__('os')"}, {"blockskip": "[" * 100_000},
     {"blockskip": "1" * 5000}],
    ids=range(11),
)  # fmt: skip
def test_foreign_metadata_is_read_as_none(strings):
    assert metadata_from_strings(strings) == {}


def test_metadata_is_json_and_sorted():
    assert json.loads(metadata_to_strings({"b": 1, "a": 2})["blockskip"]) == {"a": 2, "b": 1}
    assert metadata_to_strings({"b": 1, "a": 2}) == metadata_to_strings({"a": 2, "b": 1})

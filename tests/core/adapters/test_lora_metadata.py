"""Metadata of LoRA files: ours, what we write for other programs, and what we read from theirs."""

import json
from datetime import datetime

import pytest
from blockskip_pack.blockskip_core.adapters.lora_metadata import (
    describe,
    metadata_from_strings,
    metadata_of_others,
    metadata_to_strings,
)


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


RUN = {
    "architecture": "flux-1-dev", "base_model_version": "flux1", "rank": 16, "alpha": 8.0, "steps": 3,
    "steps_planned": 500, "learning_rate": 1e-4, "seed": 7, "patch_max": 512, "batch_size": 2, "accumulation": 4,
    "trained_with": "BlockSkip 1",
}  # fmt: skip


def test_other_programs_find_what_they_look_for():
    strings = metadata_to_strings(RUN, title="toby_00001")
    assert all(isinstance(text, str) for pair in strings.items() for text in pair)
    assert strings["modelspec.sai_model_spec"] == "1.0.1"
    assert strings["modelspec.architecture"] == "flux-1-dev/lora"
    assert strings["modelspec.title"] == strings["ss_output_name"] == "toby_00001"
    assert strings["modelspec.resolution"] == "512x512"
    assert datetime.fromisoformat(strings["modelspec.date"]).tzinfo is not None
    assert {key: strings[key] for key in strings if key.startswith("ss_")} == {
        "ss_base_model_version": "flux1", "ss_network_dim": "16", "ss_network_alpha": "8.0", "ss_steps": "3",
        "ss_max_train_steps": "500", "ss_learning_rate": "0.0001", "ss_seed": "7", "ss_batch_size_per_device": "2",
        "ss_gradient_accumulation_steps": "4", "ss_training_comment": "BlockSkip 1", "ss_output_name": "toby_00001",
    }  # fmt: skip
    assert {"modelspec.implementation", "format"} <= strings.keys()
    assert metadata_from_strings(strings) == RUN


def test_what_is_not_known_is_not_said():
    assert metadata_to_strings({"steps": 3}).keys() == {"format", "blockskip", "ss_steps"}


KOHYA = {
    "ss_network_dim": "4", "ss_base_model_version": "flux1", "modelspec.title": "Toby", "ss_sd_model_name": "None",
    "ss_tag_frequency": json.dumps({"10_toby": {"toby dog": 10, "grass": 3}, "x": {"grass": 9}}), "ss_noise_offset": "None",
    "sshs_model_hash": "abc",
}  # fmt: skip


def test_what_files_of_others_say_is_read():
    assert metadata_of_others(KOHYA) == {
        "title": "Toby", "base model version": "flux1", "rank": "4", "words of the captions": "grass, toby dog",
        "further entries": "2 (ss_noise_offset, sshs_model_hash)",
    }  # fmt: skip
    assert metadata_of_others({"format": "pt"}) == metadata_of_others(None) == {}


@pytest.mark.parametrize(
    "text",
    ["x" * 10_000, "a\x00b\x1b[31m\u202e", "line\nline", "[" * 100_000, "{}", '{"a": 1}', '{"a": {"b": "c"}}', '{"a": {"b": 1e9}}', "null"],
    ids=range(9),
)  # fmt: skip
def test_whatever_others_say_becomes_short_printable_lines(text):
    told = metadata_of_others({"modelspec.title": text, "ss_tag_frequency": text, text: text})
    for name, line in told.items():
        assert f"{name}{line}".isprintable()
        assert len(line) <= 200


def test_the_description_has_what_was_done_and_what_is_said():
    assert describe({"rank": 4, "skipped_first": 2}, 20, 7).splitlines() == [
        "7 layers patched, 20 tensors.", "rank: 4", "skipped first: 2",
    ]  # fmt: skip
    assert describe({}, 0, 7, "Two are not used.").splitlines() == [
        "7 layers patched, 0 tensors.", "Two are not used.", "The file has no metadata.",
    ]  # fmt: skip

"""A run file and the command train what the trainer's node trains, bit for bit."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .outside import newest_lora


def same_file(a, b):
    """Whether two LoRA files have the same tensors, bit for bit."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_outside(outside, run, processes=1, **more):
    """Carry out a run in some processes and return the LoRA's file."""
    before = set((outside.output / "loras").glob("*_.safetensors"))
    ended = outside.server.train(outside.command.arguments(run), processes, **more)
    assert [one.code for one in ended] == [0] * processes, ended
    (made,) = set((outside.output / "loras").glob("*_.safetensors")) - before
    assert made.name in ended[0].said
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"storage": "chunked", "chunk_size": 3},
        {"storage": "on the fly"},
        {"back_residual": "exact"},
        {"back_residual": "linear"},
        {"checkpoint": True},
        {"dtype": torch.bfloat16},
        {"patch_shape": "as pictures"},
    ],
    ids=["disk", "chunked", "on the fly", "exact", "linear", "checkpoint", "bf16", "shapes"],
)
def test_the_command_trains_the_lora_of_the_node_bit_for_bit(outside, changes):
    given = outside.prepare(**changes)
    run = outside.write(given, resume=False)
    outside.train(given, resume=False)
    expected = newest_lora(outside.output)
    trained = trained_outside(outside, run)
    assert same_file(trained, expected)
    assert trained.with_suffix(".html").is_file()
    assert trained.with_suffix(".csv").read_text() == expected.with_suffix(".csv").read_text()


@pytest.mark.parametrize("with_references", [False, True])
def test_an_average_dropped_captions_and_references_go_with_the_file(outside, tiny, pictures, with_references):
    """The empty caption is another text, so that it makes a difference."""
    material = {"caption_dropout": 0.5, "empty_caption": tiny.captions((5, 3))[1]}
    if with_references:
        material |= {"references": pictures, "reference_size": 32}
    given = outside.prepare(**material)
    run = outside.write(given, resume=False, ema=0.5)
    trained = outside.train(given, resume=False, ema=0.5)
    assert trained[0].metadata["dropped_captions"] == 5
    expected = newest_lora(outside.output)
    found = trained_outside(outside, run)
    assert same_file(found, expected)
    assert "5 of 10 training examples (50.0%) have the empty caption" in found.with_suffix(".html").read_text("utf-8")


def test_files_from_before_there_were_averages_and_dropped_captions_are_read(outside):
    given = outside.prepare()
    run = outside.write(given, resume=False)
    content = json.loads(run.read_text(encoding="utf-8"))
    assert (content["settings"].pop("ema"), content["residuals"].pop("dropped")) == (0.0, 0)
    run.write_text(json.dumps(content), encoding="utf-8")
    outside.train(given, resume=False)
    expected = newest_lora(outside.output)
    assert same_file(trained_outside(outside, run), expected)


@pytest.mark.parametrize("part", ["whole", "same part"])
def test_captions_with_references_train_outside_too(outside, pictures, part):
    """Edit models: every picture, or every training example, has a caption that carries its reference."""
    given = outside.prepare(references=pictures, reference_part=part, reference_size=48)
    run = outside.write(given, resume=False)
    outside.train(given, resume=False)
    assert same_file(trained_outside(outside, run), newest_lora(outside.output))
    with safe_open(run.with_suffix(".safetensors"), "pt") as file:
        texts = [name for name in file.keys() if name.endswith("/0/0")]
    assert len(texts) == 1  # the one prompt of all


@pytest.mark.parametrize("storage", ["chunked", "on the fly"])
def test_several_processes_need_no_cache(outside, storage):
    given = outside.prepare(storage=storage, chunk_size=3)
    run = outside.write(given, resume=False, accumulation=2)
    outside.train(given, resume=False, accumulation=2)
    expected = newest_lora(outside.output)
    assert same_file(trained_outside(outside, run, 2), expected)


@pytest.mark.parametrize(("accumulation", "processes"), [(2, 2), (4, 2), (4, 4)])
def test_several_processes_train_the_same_lora(outside, accumulation, processes):
    given = outside.prepare()
    run = outside.write(given, resume=False, accumulation=accumulation)
    outside.train(given, resume=False, accumulation=accumulation)
    expected = newest_lora(outside.output)
    trained = trained_outside(outside, run, processes)
    if accumulation == 2:  # one sum of two, in whatever order
        assert same_file(trained, expected)
    a, b = load_file(expected), load_file(trained)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)


def test_other_software_computes_its_own_residuals_and_says_so(outside):
    """A run that was written elsewhere is named by the versions and the dtype of where it was written."""
    given = outside.prepare()
    run = outside.write(given, resume=False)
    content = json.loads(run.read_text())
    content["residuals"]["identity"] |= {"host": "ComfyUI 0.1", "dtype": "torch.float16"}
    run.write_text(json.dumps(content))
    before = set((outside.output / "blockskip" / "residuals").iterdir())
    (ended,) = outside.server.train(outside.command.arguments(run))
    assert ended.code == 0
    assert "The run was written with ComfyUI 0.1 in torch.float16, and this is ComfyUI" in ended.said
    assert set((outside.output / "blockskip" / "residuals").iterdir()) == before  # the same as the node's


def test_a_model_that_is_a_link_is_read_from_where_it_leads(outside, tmp_path):
    given = outside.prepare()
    (tmp_path / "disk").mkdir()
    shutil.move(outside.models / "tiny.safetensors", tmp_path / "disk")
    try:
        os.symlink(tmp_path / "disk" / "tiny.safetensors", outside.models / "tiny.safetensors")
    except OSError:
        pytest.skip("this system makes no links")
    run = outside.write(given, resume=False)  # checks the command that is shown
    (ended,) = outside.server.train(outside.command.arguments(run, "--models", str(tmp_path / "disk")))
    assert ended.code == 0, ended


def test_writing_a_run_and_refusing_one_remove_no_training_states(outside, core, monkeypatch):
    """Old states are removed by the run that is carried out, and by its process 0 alone."""
    given = outside.prepare()
    states = outside.output / "blockskip" / "runs"
    for number in range(6):
        (states / f"old-{number}").mkdir(parents=True)
        (states / f"old-{number}" / "state-00000001.safetensors").touch()
    run = outside.write(given, resume=False, accumulation=2)
    other = run.with_name("other.json")
    other.write_text(run.read_text().replace('"seed": 5', '"seed": 6', 1))
    arguments = {0: outside.command.arguments(run), 1: outside.command.arguments(other)}
    assert [one.code for one in outside.server.train(arguments, 2)] == [1, 1]
    assert len(list(states.iterdir())) == 6
    trained_outside(outside, run, 2)
    assert len(list(states.glob("old-*"))) < 6

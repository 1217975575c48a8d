"""Runs outside ComfyUI that are killed, stopped, moved and resumed, in any number of processes, end with the same LoRA."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file

from .outside import Outside, newest_lora
from .test_write_run import same_file, trained_outside

KILLED = -9
AT_STEP_2 = {"phase": "training step", "done": 2}


@pytest.fixture
def run(outside):
    """A run of two micro-batches a step, and the LoRA that the node trains; no training state is left."""
    given = outside.prepare()
    outside.train(given, resume=False, accumulation=2)
    outside.expected = newest_lora(outside.output)
    shutil.rmtree(outside.output / "blockskip" / "runs")
    return outside.write(given, accumulation=2, save_every=1)


def states(output):
    return sorted(path.name for path in output.rglob("state-*.safetensors"))


def test_a_killed_process_ends_the_run_with_everything_saved_and_any_number_goes_on(outside, run):
    arguments = outside.command.arguments(run)
    first, second = outside.server.train(arguments, 2, events={1: {"signal": "SIGKILL", **AT_STEP_2}})
    assert (first.code, second.code) == (1, KILLED)
    assert "lost the others: one of them has ended" in first.said
    assert "Traceback" not in first.said
    assert states(outside.output)[-1] == "state-00000002.safetensors"
    assert f"The LoRA so far is saved as {newest_lora(outside.output).name}." in first.said
    assert same_file(trained_outside(outside, run), outside.expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_request_to_stop_is_obeyed_after_the_step(outside, run, name):
    (ended,) = outside.server.train(outside.command.arguments(run), events={0: {"signal": name, **AT_STEP_2}})
    assert ended.code == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert "Stopped. Start the same command again to continue." in ended.said
    assert states(outside.output)[-1] == "state-00000002.safetensors"
    assert same_file(trained_outside(outside, run, 2), outside.expected)


def test_a_run_can_be_moved_to_another_machine(outside, run, tmp_path):
    """The run file, what is beside it and the output folder are all that has to be copied."""
    outside.server.train(outside.command.arguments(run), 2, events={0: {"signal": "SIGTERM", **AT_STEP_2}})
    there = tmp_path / "there"
    shutil.copytree(outside.output, there / "output")
    shutil.move(outside.models, there / "models")
    shutil.rmtree(outside.output / "blockskip")
    outside.command = Outside(outside.command.comfyui, there / "models", there / "output")
    outside.output = there / "output"
    moved = there / "output" / "runs" / run.name
    assert same_file(trained_outside(outside, moved), outside.expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_residuals_that_are_not_there_are_computed(outside, run, processes):
    shutil.rmtree(outside.output / "blockskip")
    assert same_file(trained_outside(outside, run, processes), outside.expected)
    (cache,) = (outside.output / "blockskip" / "residuals").iterdir()
    assert cache.name != load_key(run)  # nothing that comes from a run file is kept where ComfyUI looks


def load_key(run):
    """The name of the cache: the hash of its identity."""
    from blockskip_pack.blockskip_core.runs.run_file import RunFile

    return RunFile.read(run).identity.key


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous needs libuv there")
def test_torchrun_starts_it(outside, run):
    done = outside.command.train(run, processes=2)
    assert done.code == 0, done.said
    assert same_file(newest_lora(outside.output), outside.expected)
    assert "training step: 4 of 4" in done.said


def test_a_lora_to_train_further_is_in_the_file_beside_it(outside):
    given = outside.prepare()
    first = outside.train(given, resume=False)[0]
    run = outside.write(given, resume=False, start_from=first)
    outside.train(given, resume=False, start_from=first)
    expected = newest_lora(outside.output)
    assert "start" not in json.loads(run.read_text())["settings"]
    assert same_file(trained_outside(outside, run), expected)
    assert any(name.startswith("start/") for name in load_file(run.with_suffix(".safetensors")))

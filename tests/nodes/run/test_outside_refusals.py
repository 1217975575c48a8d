"""What the command refuses: one sentence in process 0, an exit code that is not zero in all, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .outside import Outside, model_in_a_file


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A place for the files of a run that would start, which is written once."""
    return tmp_path_factory.mktemp("original")


@pytest.fixture
def written(outside):
    """A run file that would start, and ``outside.given``, from which it was written."""
    outside.given = outside.prepare()
    return outside.write(outside.given, resume=False)


@pytest.fixture
def run(outside, original):
    """A copy of that run file, with everything that it needs."""
    if not (original / "output").exists():
        outside.write(outside.prepare(), resume=False)
        shutil.copytree(outside.output, original / "output")
        shutil.copytree(outside.models, original / "models")
    for name, there in (("output", outside.output), ("models", outside.models)):
        shutil.copytree(original / name, there, dirs_exist_ok=True)
    return next((outside.output / "runs").glob("*.json"))


def files(outside):
    """Every file of output and models, except locks and the logs of other programs."""
    folders = (outside.output, outside.models)
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def edited(run, change):
    """Change a run file's content and return its path."""
    content = json.loads(run.read_text())
    change(content)
    run.write_text(json.dumps(content))
    return run


def refused(outside, arguments, sentence, processes=1):
    """The command must refuse, and leave everything as it was."""
    before = files(outside)
    ended = outside.server.train(arguments, processes)
    assert [one.code for one in ended] == [1] * processes, ended
    assert sentence in ended[0].said
    assert all("Traceback" not in one.said for one in ended)
    assert len(ended[0].said.strip().splitlines()) == 1
    assert [one.said for one in ended[1:]] == [""] * (processes - 1)
    assert files(outside) == before


CHANGES = {
    "another version": (lambda run: run.update(version=2), "has format 2, and this version of BlockSkip"),
    "another format": (lambda run: run.update(format="x"), "is not a run file"),
    "an unknown host": (lambda run: run.update(host="elsewhere"), "is for the host 'elsewhere', and this version knows"),
    "another schedule": (lambda run: run["schedule"].update(seed=99), "has another schedule than its hash says"),
    "a caption between two": (lambda run: run["schedule"]["draws"][0].__setitem__(1, 0.5), "caption must be a whole number"),
    "a dtype that is none": (
        lambda run: run["residuals"]["identity"].update(dtype="torch.nope"), "Residuals have one of the dtypes float64"
    ),
    "a draw that is text": (lambda run: run["schedule"]["draws"][0].__setitem__(2, "x"), "cannot be read"),
    "another selection": (lambda run: run["selection"].update(front=0), "another selection of blocks"),
    "no settings": (lambda run: run.pop("settings"), "has no settings"),
    "an unknown setting": (lambda run: run["settings"].update(turbo=1), "settings has turbo, which this version does not"),
    "a text as a number": (lambda run: run["settings"].update(steps="4"), "steps in settings must be a int, got '4'"),
    "a number out of range": (lambda run: run["settings"].update(steps=0), "steps must be at least 1, got 0"),
    "a missing setting": (lambda run: run["settings"].pop("seed"), "settings has no seed"),
    "a choice that is none": (lambda run: run["settings"].update(optimizer="SGD"), "optimizer in settings must be one of"),
    "another loader": (lambda run: run["model"].update(loader="pickle"), "loader in model must be one of diffusion model"),
    "a dtype that is code": (lambda run: run["model"].update(dtype="save"), "must be a torch dtype, got 'save'"),
    "a place to write outside": (
        lambda run: run["settings"].update(output_name="../x"), "must stay inside ComfyUI's output folder"
    ),
    "the model one level up": (lambda run: run["model"].update(file="../tiny.safetensors"), "could lead out of the folders"),
    "the model anywhere": (lambda run: run["model"].update(file="/etc/passwd"), "could lead out of the folders named with --m"),
    "the model on a drive": (lambda run: run["model"].update(file="C:\\m.safetensors"), "could lead out of the folders"),
    "the model on a share": (lambda run: run["model"].update(file="\\\\host\\m.safetensors"), "could lead out of the folders"),
    "a way up in Windows": (lambda run: run["model"].update(file="a\\..\\..\\m.sft"), "could lead out of the folders"),
    "the material anywhere": (lambda run: run["material"].update(file="../x.safetensors"), "could lead out of the folders named"),
    "a model that is not there": (lambda run: run["model"].update(file="gone.safetensors"), "There is no file gone.safetensors"),
    "a model of another kind": (lambda run: run["model"].update(file="tiny.pt"), "is not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_run_file(outside, run, name):
    change, sentence = CHANGES[name]
    (outside.models / "tiny.pt").write_bytes(b"code")
    refused(outside, outside.command.arguments(edited(run, change)), sentence)


def test_in_several_processes_only_the_first_speaks(outside, run):
    edited(run, CHANGES["another version"][0])
    refused(outside, outside.command.arguments(run), "has format 2", processes=2)


def test_what_only_one_process_cannot_do(outside, run, tmp_path):
    """Another machine lacks the model: all processes end, and the sentence says which one it was."""
    elsewhere = Outside(outside.command.comfyui, tmp_path, outside.output)
    arguments = {0: outside.command.arguments(run), 1: elsewhere.arguments(run)}
    refused(outside, arguments, "Process 1: There is no file tiny.safetensors", processes=2)


def test_processes_that_disagree(outside, run):
    other = run.with_name("other.json")
    shutil.copy(run, other)
    edited(other, lambda content: content["settings"].update(seed=6))
    before = files(outside)
    arguments = {0: outside.command.arguments(run), 1: outside.command.arguments(other)}
    ended = outside.server.train(arguments, 2)
    assert [one.code for one in ended] == [1, 1]
    assert "Process 1 would train another run than process 0: it differs in first values, seed." in ended[0].said
    assert files(outside) == before


def test_another_schedule_in_one_process(outside, run):
    given = outside.prepare(seed=4)
    other = outside.write(given, resume=False)
    ended = outside.server.train({0: outside.command.arguments(run), 1: outside.command.arguments(other)}, 2)
    assert [one.code for one in ended] == [1, 1]
    assert "it differs in folder of residuals, residuals: schedule." in ended[0].said


def test_a_step_that_cannot_be_shared(outside, run):
    refused(
        outside, outside.command.arguments(edited(run, lambda content: content["settings"].update(accumulation=3))),
        "accumulation must be a multiple of the number of processes, got 3 for 2 processes", processes=2,
    )  # fmt: skip


def test_another_model_of_that_name(outside, run):
    model_in_a_file(outside.models, torch.float32, seed=1)
    refused(
        outside, outside.command.arguments(run), "is not the model that this run was written for: its weights differ"
    )


def test_a_damaged_model(outside, run):
    (outside.models / "tiny.safetensors").write_bytes(b"no model")
    refused(outside, outside.command.arguments(run), "ComfyUI cannot load the model tiny.safetensors (")


def test_material_that_is_gone(outside, run):
    run.with_suffix(".safetensors").unlink()
    refused(
        outside,
        outside.command.arguments(run),
        f"There is no file {run.stem}.safetensors in the folders named with --data",
    )


def test_material_that_has_changed(outside, run):
    path = run.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    refused(outside, outside.command.arguments(run), "has changed since the run file was written beside it")


def test_latents_that_are_not_those_of_the_residuals(outside, run, core):
    """Somebody has exchanged the latents, with a hash that is right."""
    packing = core("runs.packing")
    path, content = run.with_suffix(".safetensors"), json.loads(run.read_text())
    given = packing.read_material(path, content["material"]["hash"])
    hashed = packing.write_material(replace(given, latents=given.latents + 1), path)
    edited(run, lambda content: content["material"].update(hash=hashed))
    refused(outside, outside.command.arguments(run), "were computed from other latents than this run file has")
    (cache,) = (outside.output / "blockskip" / "residuals").iterdir()
    shutil.rmtree(cache)
    assert outside.server.train(outside.command.arguments(run))[0].code == 0
    assert not cache.exists()  # where ComfyUI would look


def test_a_selection_for_another_model(outside, run, core):
    selection_of, from_json = core("selection.selection").BlockSelection, core("runs.typed").from_json

    def change(content):
        content["selection"]["family"] = "another"
        found = from_json(selection_of, content["selection"], "selection").fingerprint
        content["residuals"]["identity"]["selection"] = found

    refused(outside, outside.command.arguments(edited(run, change)), "The selection was made for")


def test_captions_that_are_none(outside, run, core):
    packing = core("runs.packing")
    path = run.with_suffix(".safetensors")
    latents = load_file(path)["latents"]
    hashed = packing.write_material(packing.Material(latents, [3]), path)
    edited(run, lambda content: content["material"].update(hash=hashed))
    refused(outside, outside.command.arguments(run), "No conditioning came in.")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_named_folders(outside, run, tmp_path):
    outside_of_it = tmp_path / "0123abcd"  # as the hub's cache names files, without an ending
    shutil.move(outside.models / "tiny.safetensors", outside_of_it)
    os.symlink(outside_of_it, outside.models / "tiny.safetensors")
    refused(outside, outside.command.arguments(run), "is a link to")
    named = outside.server.train(outside.command.arguments(run, "--models", str(tmp_path)))
    assert named[0].code == 0, named


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_run_file(outside, run, text):
    run.write_text(text)
    refused(outside, outside.command.arguments(run), run.name)


def test_a_run_file_that_is_not_there(outside, run):
    refused(outside, outside.command.arguments(run.with_name("gone.json")), "The run file cannot be read")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"comfyui": Path("nowhere")}, "--comfyui must be ComfyUI's folder"),
        ({"output": Path("no")}, "--output must be a folder"),
    ],
)
def test_folders_that_are_not_there(outside, run, changes, sentence):
    refused(outside, replace(outside.command, **changes).arguments(run), sentence)


def test_residuals_that_have_changed_are_refused_and_computed_again(outside, run):
    (shard,) = outside.output.glob("blockskip/residuals/*/shard-00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (ended,) = outside.server.train(outside.command.arguments(run))
    assert ended.code == 1
    assert "are damaged (shard-00000.safetensors). They have been removed; run again to compute them." in ended.said
    assert outside.server.train(outside.command.arguments(run))[0].code == 0


# --- what the node refuses ------------------------------------------------------------------------------------------


def test_the_node_refuses_a_model_that_is_more_than_its_file(outside, written):
    model = outside.given.model.clone()
    model.add_patches({"diffusion_model.img_in.weight": (model.model.diffusion_model.img_in.weight.data.clone(),)}, 0.5)
    outside.given.model = model
    with pytest.raises(ValueError, match="has a LoRA or another weight patch on it, which is not in its file"):
        outside.write(outside.given)


def test_the_node_refuses_a_model_of_unknown_origin(outside, written):
    outside.given.model.cached_patcher_init = None
    with pytest.raises(ValueError, match="It is not known from which file the MODEL was loaded"):
        outside.write(outside.given)


def test_a_refused_node_writes_nothing(outside, written):
    before = files(outside)
    with pytest.raises(ValueError, match="`steps` must be at most"):
        outside.write(outside.given, steps=10**9)
    with pytest.raises(ValueError, match="must stay inside ComfyUI's output folder"):
        outside.write(outside.given, run_name="../../x")
    assert files(outside) == before


def test_a_run_file_that_cannot_be_written_leaves_nothing(outside, written, core, monkeypatch):
    before = files(outside)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(core("runs.run_file").RunFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        outside.write(outside.given)
    assert files(outside) == before

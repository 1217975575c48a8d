"""The summary of a run is saved next to its LoRA, however the run ended, and cannot cost the LoRA."""

from __future__ import annotations

import platform
from contextlib import contextmanager
from xml.etree import ElementTree

import pytest
import torch


def rows(path):
    """Return name -> value of all rows of the summary."""
    tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return {row.find("th").text: row.find("td").text for row in tree.iter("tr")}


def files(bench):
    return sorted(path.name for path in bench.folders.loras.iterdir())


@contextmanager
def full_disk(core, monkeypatch, suffix):
    """A disk that refuses files of this kind."""
    import os

    atomic_files, replace = core("files"), os.replace

    def refuse(source, target):
        if str(target).endswith(suffix):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.os, "replace", refuse)
        yield


@contextmanager
def ended(nodes, monkeypatch, step, error):
    """A run that ends with this error in a step."""

    def end(self, phase, done, total, detail=""):
        if phase == "training step" and done == step:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(nodes.train_lora.NodeProgress, "__call__", end)
        with pytest.raises(type(error)):
            yield


def test_it_lies_beside_the_lora_and_says_what_the_node_says(bench):
    trained = bench.train(output_name="loras/toy", batch_size=2)
    assert files(bench) == ["toy_00001_.html", "toy_00001_.safetensors"]
    found, said = rows(bench.folders.loras / "toy_00001_.html"), trained.ui["blockskip"][0]
    assert said["summary_file"] == "toy_00001_.html"
    assert (found["Steps"], found["Problems"]) == ("3 of 3", "none")
    assert found["Self-check"].startswith(f"{said['self_check']:.1e} ")
    assert found["Time per step"].startswith(f"{said['seconds_per_step']:.3f} s ")
    first, last = (f"{said[f'loss_of_{which}_tenth']:.4g}" for which in ("first", "last"))
    assert found["Loss, mean of the first and the last tenth"] == f"{first}, {last}"
    assert (
        f"{said['kept_parameters']:,} of {said['all_parameters']:,} parameters"
        in found["Weights of the blocks that ran"]
    )
    assert f", {said['lora_parameters']:,} parameters" in found["LoRA"]
    assert said["peak_memory_of"] in found["Peak memory"]
    assert (found["Model family"], found["Skipped"]) == ("FLUX.1", "the first 2 and the last 1 of 6")
    assert found["Training examples"] == "6, of which 6 were trained on"
    assert found["Patch sizes"] == "crops of 32 to 64 px, each resized to 32 px"
    assert (found["Pictures"], found["Captions"], found["Residuals"]) == ("3", "1", "disk")


def test_it_names_every_setting_of_the_node(bench, nodes):
    changed = {"alpha": 8.0, "lr_schedule": "cosine", "warmup_steps": 1, "activation_budget": 0.5, "save_every": 7}
    bench.train(output_name="loras/toy", **changed)
    found = rows(bench.folders.loras / "toy_00001_.html")
    widgets = [entry.id for entry in nodes.TrainLora.GET_SCHEMA().inputs if entry.id not in ("model", "residuals")]
    assert [name for name in widgets if name not in found] == []
    assert (found["alpha"], found["lr_schedule"], found["warmup_steps"]) == ("8", "cosine", "1")
    assert (found["activation_budget"], found["save_every"]) == ("0.5 GiB", "7")
    assert (found["learning_rate"], found["seed"], found["rank"]) == ("0.01", "5", "4")
    assert (found["resume"], found["checkpointing"], found["start_from"]) == ("off", "on", "nothing")


def test_it_names_the_versions(bench):
    bench.train(output_name="loras/toy")
    found = rows(bench.folders.loras / "toy_00001_.html")
    assert found["torch"] == torch.__version__
    assert found["Python"] == platform.python_version()
    assert found["ComfyUI"][0].isdigit()
    assert found["Device"].startswith("cpu")


def test_a_name_that_looks_like_markup_stays_a_name(bench):
    """Angle brackets and quotes are not allowed in file names on Windows, and are refused earlier."""
    bench.train(output_name="loras/a&amp;'c&#60;b")
    assert files(bench) == ["a&amp;'c&#60;b_00001_.html", "a&amp;'c&#60;b_00001_.safetensors"]
    page = (bench.folders.loras / files(bench)[0]).read_text(encoding="utf-8")
    assert next(ElementTree.fromstring(page).iter("h1")).text == "a&amp;'c&#60;b_00001_.safetensors"


def test_a_run_of_one_step_has_one(bench):
    bench.train(output_name="loras/toy", steps=1)
    assert rows(bench.folders.loras / "toy_00001_.html")["Steps"] == "1 of 1"


def test_a_cancelled_run_has_one_too(bench, nodes, monkeypatch):
    import comfy.model_management

    with ended(nodes, monkeypatch, 2, comfy.model_management.InterruptProcessingException()):
        bench.train(output_name="loras/toy")
    assert files(bench) == ["toy_00001_.html", "toy_00001_.safetensors"]
    assert rows(bench.folders.loras / "toy_00001_.html")["Steps"] == "2 of 3"


def test_a_run_that_failed_has_one_if_it_has_a_lora(bench, nodes, monkeypatch):
    with ended(nodes, monkeypatch, 2, RuntimeError("out of memory")):
        bench.train(output_name="loras/toy")
    assert rows(bench.folders.loras / "toy_00001_.html")["Steps"] == "2 of 3"
    with pytest.raises(ValueError, match="is not finite in step 2"):
        bench.train(output_name="loras/other", learning_rate=1e30)
    assert rows(bench.folders.loras / "other_00001_.html")["Steps"] == "1 of 3"


def test_a_run_that_was_finished_before_says_so(bench):
    residuals = bench.precompute()[0]
    for name in ("first", "again"):
        bench.train(residuals=residuals, resume=True, output_name=f"loras/{name}")
    found = rows(bench.folders.loras / "again_00001_.html")
    assert (found["Resumed at"], found["Steps"]) == ("step 3", "3 of 3")
    assert found["Time per step"].startswith("no step was timed")


def test_a_disk_that_refuses_it_is_reported_and_the_lora_is_there(bench, core, monkeypatch):
    with full_disk(core, monkeypatch, ".html"):
        trained = bench.train(output_name="loras/toy")
    assert files(bench) == ["toy_00001_.safetensors"]
    said = trained.ui["blockskip"][0]
    assert (said["file"], said["summary_file"]) == ("toy_00001_.safetensors", None)
    assert [problem for problem in said["problems"] if "toy_00001_.html could not be written" in problem]
    assert trained[0]


def test_a_cancelled_run_on_such_a_disk_keeps_its_lora_and_stays_cancelled(bench, nodes, core, monkeypatch):
    import comfy.model_management

    with (
        full_disk(core, monkeypatch, ".html"),
        ended(nodes, monkeypatch, 2, comfy.model_management.InterruptProcessingException()),
    ):
        bench.train(output_name="loras/toy")
    assert files(bench) == ["toy_00001_.safetensors"]


def test_without_a_lora_there_is_none(bench, core, monkeypatch):
    with full_disk(core, monkeypatch, "loras/toy_00001_.safetensors"):
        trained = bench.train(output_name="loras/toy")
    assert files(bench) == []
    assert trained.ui["blockskip"][0]["summary_file"] is None


def test_loaders_do_not_list_it(bench):
    import folder_paths

    bench.train(output_name="loras/toy")
    assert folder_paths.get_filename_list("loras") == ["toy_00001_.safetensors"]


def test_what_was_said_of_earlier_trouble_is_in_it(bench, core, monkeypatch):
    with full_disk(core, monkeypatch, "step000001.safetensors"):
        bench.train(output_name="loras/toy", save_every=1)
    found = rows(bench.folders.loras / "toy_00001_.html")
    assert found["Problems"] == "1, see above"
    text = (bench.folders.loras / "toy_00001_.html").read_text(encoding="utf-8")
    assert "toy_00001_step000001.safetensors could not be written" in text


def test_the_line_under_the_node_names_it(bench, nodes, core, monkeypatch):
    lines = []
    monkeypatch.setattr(nodes.train_lora.NodeProgress, "say", lambda self, text: lines.append(text))
    residuals = bench.precompute(storage="on the fly")[0]
    lines.clear()
    bench.train(residuals=residuals, output_name="loras/toy")
    with full_disk(core, monkeypatch, ".html"):
        bench.train(residuals=residuals, output_name="loras/other")
    assert lines[0] == "3 steps; saved as toy_00001_.safetensors, summary in toy_00001_.html"
    assert "summary in" not in lines[1]
    assert "other_00001_.html could not be written" in lines[1]


def test_a_lora_that_vanishes_at_once_is_reported(bench, core, monkeypatch):
    save = core("hosts.runs.files").save_lora

    def vanishing(tensors, metadata, path):
        save(tensors, metadata, path)
        path.unlink()

    monkeypatch.setattr(core("hosts.runs.files"), "save_lora", vanishing)
    problems = bench.train(output_name="loras/toy").ui["blockskip"][0]["problems"]
    assert [problem for problem in problems if "toy_00001_.safetensors" in problem]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_loss_table_stands_beside_the_lora_if_asked_for(bench, wanted):
    trained = bench.train(steps=3, accumulation=2, loss_table=wanted)
    tables = list(bench.folders.loras.glob("*.csv"))
    assert [table.stem for table in tables] == [
        trained.ui["blockskip"][0]["file"].removesuffix(".safetensors")
    ] * wanted
    for table in tables:
        losses = trained[1]["loss"]
        lines = table.read_text(encoding="utf-8").splitlines()
        assert [float(line.split(",")[1]) for line in lines[1:]] == [
            (a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)
        ]

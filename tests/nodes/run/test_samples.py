"""Samples while training, through the nodes: shown, saved, and without effect on the training."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ..trainings import cancelled_after


@pytest.fixture
def sampling(bench, nodes, run_node):
    def request(**changes):
        ordinary = {
            "positive": bench.prompt, "vae": bench.vae, "every": 2, "at_start": True, "width": 64, "height": 32,
            "sampler_steps": 2, "cfg": 1.0, "scheduler": "simple", "seed": 1,
        }  # fmt: skip
        return run_node(nodes.SampleWhileTraining, **{**ordinary, **changes})[0]

    return request


@pytest.fixture
def encoder(comfyui):
    """A CLIP_VISION; its file is not in a package."""
    path = Path(__file__).resolve().parents[2] / "hosts" / "vision_encoders.py"
    return runpy.run_path(str(path))["QuadrantEncoder"]()


def pictures(bench):
    return sorted(path.name for path in bench.folders.loras.glob("*.png"))


def said(trained):
    return trained.ui["blockskip"][0]


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
def test_the_lora_is_bit_for_bit_the_one_without_samples(bench, sampling, storage):
    residuals = bench.precompute(storage=storage, chunk_size=4)[0]
    plain = bench.train(residuals=residuals, steps=5, accumulation=2)
    with_samples = bench.train(residuals=residuals, steps=5, accumulation=2, samples=sampling())
    assert all(torch.equal(with_samples[0][name], tensor) for name, tensor in plain[0].items())
    assert with_samples[1] == plain[1]
    assert said(with_samples)["problems"] == []
    assert [name.split("step")[1] for name in pictures(bench)] == [
        "000000_1.png", "000002_1.png", "000004_1.png", "000005_1.png",
    ]  # fmt: skip


def in_chart(trained):
    """The samples that the chart on the trainer's node shows."""
    return trained.ui["blockskip_chart"][0]["samples"]


def test_pictures_stand_beside_the_lora_and_in_the_chart(bench, sampling):
    trained = bench.train(samples=sampling(), steps=3)
    assert [sample["file"] for sample in in_chart(trained)] == pictures(bench)
    assert {sample["subfolder"] for sample in in_chart(trained)} == {"loras"}
    assert sorted({sample["step"] for sample in in_chart(trained)}) == [0, 2, 3]
    assert "images" not in trained.ui  # the host would show them a second time, and make the node taller
    stem = said(trained)["file"].removesuffix(".safetensors")
    assert all(name.startswith(stem) for name in pictures(bench))
    with (
        Image.open(bench.folders.loras / pictures(bench)[0]) as first,
        Image.open(bench.folders.loras / pictures(bench)[-1]) as last,
    ):
        assert first.size == (64, 32)
        assert first.tobytes() != last.tobytes()  # the LoRA has changed the picture
        assert not first.info  # the file has no information about the machine


def ask(nodes, run=None):
    """The answer's status to someone who asks the run, or the bench's latest, to sample now."""
    live = nodes.page.live_chart
    latest = live.HISTORY.last("1", None)
    return asyncio.run(live.sample_now(SimpleNamespace(query={"run": latest.run if run is None else run}))).status


def test_who_asks_for_a_sample_gets_it_after_the_step_and_changes_nothing(bench, nodes, sampling, monkeypatch):
    import comfy.model_management

    residuals = bench.precompute()[0]
    plain = bench.train(residuals=residuals, steps=5)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")
    line = nodes.run.training.ProgressLine
    show, asked = line.on_step, []

    def asking(self, step):
        show(self, step)
        if step.step in (1, 3):
            asked.append(ask(nodes))
        if step.step == 4 and len(asked) == 2:
            asked.append(ask(nodes))  # Cancel is faster
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(line, "on_step", asking)
    request = sampling(every=100, at_start=False)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        bench.train(residuals=residuals, steps=5, resume=True, samples=request)
    assert (asked, ask(nodes)) == ([200, 200, 200], 409)
    assert [name.split("step")[1] for name in pictures(bench)] == ["000001_1.png", "000003_1.png"]
    trained = bench.train(residuals=residuals, steps=5, resume=True, samples=request)
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in plain[0].items())
    assert [sample["step"] for sample in in_chart(trained)] == [1, 3, 5]  # the first two by the interrupted run
    assert (trained.ui["blockskip_chart"][0]["wants_sample"], ask(nodes)) == (False, 409)


def test_without_a_request_there_is_no_picture_and_none_on_demand(bench, nodes, monkeypatch):
    line, answers = nodes.run.training.ProgressLine, []
    monkeypatch.setattr(line, "on_step", lambda *_: answers.append((ask(nodes), ask(nodes, "../" * 99 + "\0"))))
    assert in_chart(bench.train()) == []
    assert set(answers) == {(409, 409)}
    assert not pictures(bench)


def test_pictures_are_in_the_summary(bench, sampling, run_node):
    trained = bench.train(samples=sampling(positive=bench.prompt), steps=3)
    page = (bench.folders.loras / said(trained)["summary_file"]).read_text()
    assert page.count("<img ") == 3
    assert [label in page for label in ("step 0<", "step 2<", "step 3<")] == [True] * 3


def test_sampling_that_fails_is_told_and_ends_nothing(bench, sampling, monkeypatch):
    plain = bench.train(steps=3)
    calls = []

    def broken(latent):
        calls.append(latent)
        raise RuntimeError("out of paint")

    request = sampling()
    monkeypatch.setattr(bench.vae, "decode", broken)
    trained = bench.train(steps=3, samples=request)
    assert len(calls) == 1
    (problem,) = said(trained)["problems"]
    assert problem.startswith("Sampling after step 0 failed (RuntimeError: out of paint). This run samples no more")
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in plain[0].items())


def test_cancel_while_sampling_keeps_what_was_learned(bench, nodes, sampling, monkeypatch):
    import comfy.model_management

    residuals = bench.precompute()[0]
    plain = bench.train(residuals=residuals, steps=5)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")
    show = nodes.train_lora.NodeProgress.__call__

    def cancelling(self, phase, done, total, detail=""):
        if phase == "sampling after step 2":
            raise comfy.model_management.InterruptProcessingException
        show(self, phase, done, total, detail)

    with monkeypatch.context() as patch:
        patch.setattr(nodes.train_lora.NodeProgress, "__call__", cancelling)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            bench.train(residuals=residuals, steps=5, resume=True, samples=sampling())
    trained = bench.train(residuals=residuals, steps=5, resume=True, samples=sampling())
    assert said(trained)["resumed_at"] == 2
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in plain[0].items())
    steps = [sample["file"].split("step")[1][:6] for sample in in_chart(trained)]
    assert steps == ["000000", "000002", "000004", "000005"]  # the one that Cancel prevented is made now


def test_the_state_is_kept_before_sampling(bench, nodes, sampling, monkeypatch):
    """A process is most likely to be killed for its memory when the whole model is loaded."""
    kept = []

    def look(self, step):
        kept.append((step, [path.name for path in bench.folders.output.glob("blockskip/runs/*/state-*.safetensors")]))

    monkeypatch.setattr(nodes.run.samples.RunSamples, "between_steps", look)
    bench.train(samples=sampling(), steps=3, save_every=100)
    assert [step for step, _ in kept] == [0, 2, 3]
    assert ["state-00000002.safetensors" in names for _, names in kept] == [False, True, True]


def test_a_finished_run_is_sampled_again_when_it_is_queued_again(bench, sampling):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, resume=True)
    again = bench.train(residuals=residuals, resume=True, samples=sampling())
    assert said(again)["resumed_at"] == 3
    assert [sample["file"].split("step")[1] for sample in in_chart(again)] == ["000003_1.png"]


def test_the_time_of_samples_belongs_to_no_step(bench, nodes, sampling, monkeypatch):
    import time

    residuals = bench.precompute()[0]
    real = nodes.run.samples.RunSamples._keep

    def slow(self, *args):
        time.sleep(0.5)
        real(self, *args)

    monkeypatch.setattr(nodes.run.samples.RunSamples, "_keep", slow)
    trained = bench.train(residuals=residuals, steps=4, samples=sampling(every=1))
    assert said(trained)["seconds_per_step"] < 0.45


def test_what_is_no_request_is_refused(bench):
    with pytest.raises(ValueError, match="samples must come from Sample While Training, got a str"):
        bench.train(samples="every 100 steps")


def test_a_size_that_the_model_cannot_have_is_refused_before_the_run(bench, sampling):
    with pytest.raises(ValueError, match="width must be a multiple of 16"):
        sampling(width=72)


def test_samples_are_compared_with_the_training_pictures(bench, sampling, encoder):
    request = sampling(clip_vision=encoder, reference_images=bench.pictures)
    trained = bench.train(samples=request, steps=4, save_every=2)
    shown = in_chart(trained)
    assert [sample["step"] for sample in shown] == [0, 2, 4]
    assert all(0.0 < sample["likeness"] < 1.0 for sample in shown)
    assert not encoder.is_loaded
    stem = said(trained)["file"].removesuffix(".safetensors")
    table = (bench.folders.loras / f"{stem}likeness.csv").read_text().splitlines()
    assert table[0] == "step,prompt,likeness,picture"
    assert [row.split(",")[3] for row in table[1:]] == pictures(bench)
    page = (bench.folders.loras / said(trained)["summary_file"]).read_text()
    best = max(shown, key=lambda sample: sample["likeness"])
    file = {0: "before training", 2: f"{stem}step000002.safetensors", 4: f"{stem}.safetensors"}[best["step"]]
    assert f"most alike after step {best['step']}: {best['likeness']:.4f} ({file})" in page
    assert f"step 2, likeness {shown[1]['likeness']:.4f}" in page
    plain = bench.train(steps=4)
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in plain[0].items())


def test_a_likeness_that_fails_is_told_and_ends_nothing_else(bench, sampling, encoder, monkeypatch):
    request = sampling(clip_vision=encoder, reference_images=bench.pictures)

    def broken(image):
        raise RuntimeError("out of eyes")

    monkeypatch.setattr(encoder, "encode_image", broken)
    trained = bench.train(samples=request, steps=3)
    assert [sample["likeness"] for sample in in_chart(trained)] == [None] * 3
    (problem,) = said(trained)["problems"]
    assert problem.startswith("The likeness after step 0 could not be computed (RuntimeError: out of eyes). This run")
    assert not list(bench.folders.loras.glob("*.csv"))


def test_a_run_that_resumes_shows_the_samples_made_before(bench, nodes, sampling, encoder, monkeypatch):
    residuals = bench.precompute()[0]
    alike = {"clip_vision": encoder, "reference_images": bench.pictures}
    asked = {"residuals": residuals, "resume": True, "save_every": 2, "steps": 5}
    with cancelled_after(nodes, monkeypatch, 3):
        bench.train(**asked, samples=sampling(**alike))
    before = pictures(bench)
    trained = bench.train(**asked, samples=sampling(**alike, every=4))  # when they are made does not matter
    shown, stem = in_chart(trained), said(trained)["file"].removesuffix(".safetensors")
    assert [sample["step"] for sample in shown] == [0, 2, 4, 5]
    assert [sample["file"] for sample in shown[:2]] == before
    assert {sample["subfolder"] for sample in shown} == {"loras"}
    assert all(0.0 < sample["likeness"] < 1.0 for sample in shown)
    rows = (bench.folders.loras / f"{stem}likeness.csv").read_text().splitlines()[1:]
    assert [row.split(",")[3] for row in rows] == pictures(bench)
    page = (bench.folders.loras / said(trained)["summary_file"]).read_text()
    assert page.count("<img ") == 4
    first = before[0].split("step")[0]
    assert f"most alike after step 2: {shown[1]['likeness']:.4f} ({first}step000002.safetensors)" in page or (
        max(shown, key=lambda sample: sample["likeness"])["step"] != 2
    )
    again = bench.train(**asked, samples=sampling(**alike, every=4))  # finished: nothing is made twice
    assert [sample["file"] for sample in in_chart(again)] == [sample["file"] for sample in shown]
    others = bench.train(**asked, samples=sampling(seed=2))  # other pictures cannot be compared with these
    assert [sample["step"] for sample in in_chart(others)] == [5]
    fresh = bench.train(**{**asked, "resume": False}, samples=sampling())
    assert len({sample["file"].split("step")[0] for sample in in_chart(fresh)}) == 1


@pytest.mark.parametrize(
    "row",
    [
        "loras/astep000001_1.png", None, {"file": 3}, {"step": 1, "prompt": 1, "file": "../astep000001_1.png"},
        {"step": 1, "prompt": 1, "file": "/etc/passwd"}, {"step": 1, "prompt": 1, "file": "loras/a.png"},
        {"step": 2, "prompt": 1, "file": "loras/astep000001_1.png"}, {"step": 9, "prompt": 1, "file": "astep000009_1.png"},
        {"step": 1, "prompt": 1, "file": "loras/gonestep000001_1.png"}, {"step": 1, "prompt": 1, "file": "\0step000001_1.png"},
        {"step": 1, "prompt": 1, "file": "loras/linkstep000001_1.png"},
    ],
    ids=str,
)  # fmt: skip
def test_of_the_names_of_earlier_samples_only_pictures_in_the_output_folder_count(nodes, core, folders, tmp_path, row):
    kept = core("hosts.files.kept_samples")
    asked, file = {"samples_of": "a", "likeness_to": ""}, tmp_path / "samples.json"
    real, outside = folders.loras / "astep000001_1.png", tmp_path / "outsidestep000001_1.png"
    for path in (real, outside, folders.output.parent / "astep000001_1.png", folders.output / "astep000009_1.png"):
        Image.new("RGB", (4, 4)).save(path)
    try:
        (folders.loras / "linkstep000001_1.png").symlink_to(outside)
    except OSError:
        pytest.skip("this system lets nobody make links")
    good = {"step": 1, "prompt": 1, "file": "loras/astep000001_1.png", "likeness": 0.5}
    file.write_text(json.dumps({"version": 1, **asked, "samples": [row, good]}))
    assert kept.read_kept_samples(file, asked, 8) == [kept.KeptSample(1, 1, real, 0.5)]
    assert kept.read_kept_samples(file, {**asked, "likeness_to": "b"}, 8)[0].likeness is None
    assert kept.read_kept_samples(file, {**asked, "samples_of": "b"}, 8) == []
    for damaged in ("[" * 100_000, "{", "3", json.dumps({"version": 1, **asked, "samples": 3})):
        file.write_text(damaged)
        assert kept.read_kept_samples(file, asked, 8) == []

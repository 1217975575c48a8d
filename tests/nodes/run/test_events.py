"""Files for TensorBoard, as TensorBoard reads them: the run's own numbers, each step once, also after resuming."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from ..trainings import cancelled_after, shown_in_tensorboard

FIGURES = {
    "training/loss", "training/loss_smoothed", "training/learning_rate", "training/gradient_norm", "memory/GiB_now",
    "memory/GiB_peak",
}  # fmt: skip


def folder_of(bench):
    (folder,) = (bench.folders.loras / "tensorboard").iterdir()
    return folder


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard")


def test_a_run_that_resumes_continues_its_curves(tensorboard, bench, nodes, run_node, monkeypatch):
    residuals = bench.precompute()[0]
    samples = run_node(
        nodes.SampleWhileTraining, positive=bench.prompt, vae=bench.vae, every=2, at_start=True, width=32, height=32,
        sampler_steps=1, cfg=1.0, scheduler="simple", seed=1,
    )[0]  # fmt: skip
    asked = {"residuals": residuals, "steps": 5, "accumulation": 2, "resume": True, "output_name": "loras/toy"}
    with cancelled_after(nodes, monkeypatch, 3):
        bench.train(**asked, samples=samples, save_every=2, tensorboard=True)
    (state,) = bench.folders.output.glob("blockskip/runs/*/state-00000003.safetensors")
    state.unlink()  # a crash would not have written this one, but the figures of its step
    assert folder_of(bench).name.startswith("toy-")
    trained = bench.train(**asked, samples=samples, save_every=2, tensorboard=True, loss_table=True)
    figures, pictures = shown_in_tensorboard(folder_of(bench))
    assert set(figures) == FIGURES
    assert all(sorted(points) == [1, 2, 3, 4, 5] for points in figures.values())
    losses = trained[1]["loss"]
    rows = [row.split(",") for row in (bench.folders.loras / "toy_00002_.csv").read_text().splitlines()[1:]]
    for step, loss, smoothed in rows:
        assert figures["training/loss"][int(step)] == pytest.approx(float(loss), rel=1e-6)
        assert figures["training/loss_smoothed"][int(step)] == pytest.approx(float(smoothed), rel=1e-6)
    assert figures["training/loss"][5] == pytest.approx(sum(losses[8:]) / 2, rel=1e-6)
    assert figures["training/learning_rate"][5] == pytest.approx(1e-2)
    assert all(0 < value < 1000 and math.isfinite(value) for value in figures["memory/GiB_now"].values())
    assert set(pictures["samples/prompt_1"]) == {0, 2, 4, 5}
    again = bench.train(**asked, tensorboard=True)  # nothing left to train
    assert again.ui["blockskip"][0]["problems"] == []
    assert shown_in_tensorboard(folder_of(bench))[0] == figures


def test_samples_of_the_step_at_which_a_run_begins_anew_are_written(tensorboard, core, tmp_path, monkeypatch):
    """The trainer begins anew after running out of memory, perhaps right after a sample."""
    events, samples = core("hosts.runs.events"), []
    monkeypatch.setattr(events, "events_folder", lambda path, key: tmp_path / key)
    outcome = SimpleNamespace(path=None, samples=samples, result=SimpleNamespace(losses=[0.5], problems=[]))
    run = SimpleNamespace(
        identity=SimpleNamespace(key="a"), request=SimpleNamespace(config=SimpleNamespace(steps=4, accumulation=1))
    )
    written = events.RunEvents(run, outcome)
    written.started(0)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    samples.append(SimpleNamespace(step=1, prompt=1, likeness=0.25, path=tmp_path / "one.png"))
    written.started(1)
    written.close()
    figures, pictures = shown_in_tensorboard(tmp_path / "a")
    assert outcome.result.problems == []
    assert figures["likeness/prompt_1"] == {1: 0.25}
    assert list(pictures["samples/prompt_1"]) == [1]


def test_files_that_begin_late_have_the_earlier_losses(tensorboard, bench):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, steps=2, resume=True)
    trained = bench.train(residuals=residuals, steps=3, resume=True, tensorboard=True)
    figures, _ = shown_in_tensorboard(folder_of(bench))
    assert list(figures["training/loss"].values()) == pytest.approx(trained[1]["loss"], rel=1e-6)
    assert list(figures["training/learning_rate"]) == [3]  # that of earlier steps is not known


def test_a_disk_that_fails_costs_only_these_files(tensorboard, bench, core, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(core("reporting.event_files").EventFiles, "add", full)
    trained = bench.train(tensorboard=True)
    assert trained[2] == 3
    (problem,) = trained.ui["blockskip"][0]["problems"]
    assert problem.startswith("The files for TensorBoard cannot be written ([Errno 28] No space left on device). This")


def test_without_the_package_it_is_refused_when_queued_and_before_the_first_step(bench, nodes, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = nodes.TrainLora.validate_inputs(output_name=["loras/toy"], tensorboard=[True])
    assert said == (
        "`tensorboard` is on, but the Python package tensorboard is not installed. Install it into ComfyUI's Python "
        "with `pip install tensorboard`, or turn `tensorboard` off."
    )
    assert nodes.TrainLora.validate_inputs(output_name=["loras/toy"], tensorboard=[False]) is True
    with pytest.raises(ValueError, match="pip install tensorboard"):
        bench.train(tensorboard=True)
    assert not list(bench.folders.loras.iterdir())

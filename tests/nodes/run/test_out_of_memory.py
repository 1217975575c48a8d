"""A run that runs out of memory continues with streamed weights, and ends with the same LoRA."""

from __future__ import annotations

import shutil

import pytest
import torch

STEPS = 5


@pytest.fixture
def allocator(nodes, core, monkeypatch):
    """Make the allocator fail once after each of the given steps, on a device that weights can be streamed to."""
    training = core("hosts.runs.training")
    monkeypatch.setattr(training._Training, "_can_stream", lambda self, placement: placement != "streamed")
    progress = nodes.train_lora.NodeProgress
    show, loop = progress.__call__, training.train_lora
    placements, results = [], []

    def fail_after(*steps):
        left = list(steps)
        placements.clear()

        def failing(self, phase, done, total, detail=""):
            show(self, phase, done, total, detail)
            if phase == "training step" and left and done == left[0]:
                left.pop(0)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        monkeypatch.setattr(progress, "__call__", failing)
        return placements

    def noted(*args, **settings):
        placements.append(settings["weights"])
        results.append(settings["result"])
        loop(*args, **settings)

    monkeypatch.setattr(training, "train_lora", noted)
    fail_after.results = results
    return fail_after


def said(trained):
    return trained.ui["blockskip"][0]


@pytest.mark.parametrize("save_every", [0, 1])
@pytest.mark.parametrize("failing", [1, 3, STEPS])
def test_it_continues_from_its_last_step_to_the_same_lora(bench, allocator, failing, save_every):
    residuals = bench.precompute()[0]
    expected = bench.train(residuals=residuals, steps=STEPS)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")  # otherwise it would resume from these
    placements = allocator(failing)
    trained = bench.train(residuals=residuals, steps=STEPS, save_every=save_every, output_name="loras/again")
    assert placements == ["resident", "streamed"]
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in expected[0].items())
    assert trained[1] == expected[1]
    assert len(allocator.results[-1].step_seconds) == STEPS  # no step is trained twice
    (problem,) = said(trained)["problems"]
    assert problem.startswith(f"Training ran out of memory after step {failing} (CUDA out of memory. Tried")
    assert "It continued with streamed weights, which is slower. Lower `patch_min`" in problem
    assert (said(trained)["steps"], said(trained)["file"]) == (STEPS, "again_00001_.safetensors")


def test_what_it_resumes_of_itself_is_not_told_as_an_earlier_run(bench, allocator):
    allocator(2)
    assert said(bench.train(steps=STEPS))["resumed_at"] == 0


def test_a_second_time_it_ends_with_what_was_learned_saved(bench, allocator):
    allocator(2, 4)
    with pytest.raises(RuntimeError, match="even with streamed weights .* The LoRA so far is saved as toy_0") as error:
        bench.train(steps=STEPS, output_name="loras/toy")
    assert type(error.value).__name__ == "OutOfMemoryError"
    info = bench.apply(lora_name="toy_00001_.safetensors").args[1]
    assert "steps: 4" in info


def test_weights_that_are_streamed_already_are_not_tried_again(bench, allocator):
    placements = allocator(2)
    with pytest.raises(RuntimeError, match=r"Training ran out of memory after step 2 \(CUDA"):
        bench.train(steps=STEPS, kept_weights="streamed", output_name="loras/toy")
    assert placements == ["streamed"]


def test_running_out_while_blocks_are_quantised_is_explained(bench, core, monkeypatch):
    def full(self, progress=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    residuals = bench.precompute(back_residual="exact")[0]
    monkeypatch.setattr(core("hosts.models.quantised_blocks").QuantisedDit, "quantise", full)
    with pytest.raises(RuntimeError, match=r"Quantising the blocks ran out of memory \(CUDA .+\)\. Lower `patch_min`"):
        bench.train(residuals=residuals, quantize_frozen="int8")
    assert not list(bench.folders.loras.iterdir())

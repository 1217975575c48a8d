"""Interrupted runs resume, finished ones are recognised, checkpoints are kept, other LoRAs can be trained further."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from ..trainings import assert_same, cancelled_after

STEPS = 5


def uninterrupted(bench, residuals):
    """An uninterrupted run that leaves no state."""
    trained = bench.train(residuals=residuals, steps=STEPS)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")
    return trained


def said(trained):
    return trained.ui["blockskip"][0]


@pytest.mark.parametrize(
    ("storage", "spans"),
    [("disk", {}), ("chunked", {}), ("on the fly", {}), ("disk", {"front": 1, "back": 2, "tail": 1})],
    ids=["disk", "chunked", "on the fly", "disk-span"],
)
def test_queueing_again_after_cancel_goes_on_to_the_same_lora(bench, nodes, monkeypatch, storage, spans):
    residuals = bench.precompute(selection=bench.select(**spans)[0], storage=storage)[0]
    expected = uninterrupted(bench, residuals)
    with cancelled_after(nodes, monkeypatch, 2):
        bench.train(residuals=residuals, steps=STEPS, resume=True)
    trained = bench.train(residuals=residuals, steps=STEPS, resume=True)
    assert said(trained)["resumed_at"] == 2
    assert_same(trained[0], expected[0])
    assert trained[1] == expected[1]
    assert trained[2] == STEPS


def test_a_run_that_memory_made_another_one_tells_of_the_unfinished_one(bench, nodes, monkeypatch):
    residuals = bench.precompute()[0]
    with cancelled_after(nodes, monkeypatch, 2):
        bench.train(residuals=residuals, steps=STEPS, resume=True)
    trained = bench.train(residuals=residuals, steps=STEPS, resume=True, quantize_kept="int8", batch_size=2)
    (problem,) = said(trained)["problems"]
    assert said(trained)["resumed_at"] == 0
    assert problem.startswith(
        "This is not the unfinished run of step 2 of 5, which had batch_size 1, quantize_kept off; this one has batch_size 2, "
        "quantize_kept int8."
    )
    again = bench.train(residuals=residuals, steps=STEPS, resume=True)
    assert (said(again)["resumed_at"], said(again)["problems"]) == (2, [])


@pytest.mark.parametrize(
    "changes", [{"quantize_kept": "4-bit"}, {"quantize_kept": "4-bit", "storage": "chunked"}], ids=str
)
def test_a_corrected_run_goes_on_to_the_same_lora(bench, nodes, monkeypatch, changes):
    residuals = bench.precompute(storage=changes.get("storage", "disk"))[0]
    settings = {"residuals": residuals, "steps": STEPS, "resume": True, "quantize_kept": "4-bit"}
    expected = bench.train(**settings)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")
    with cancelled_after(nodes, monkeypatch, 2):
        bench.train(**settings)
    trained = bench.train(**settings)
    assert said(trained)["resumed_at"] == 2
    assert_same(trained[0], expected[0])


def test_after_a_crash_it_goes_on_from_the_last_safe_point(bench, nodes, monkeypatch):
    residuals = bench.precompute()[0]
    expected = uninterrupted(bench, residuals)
    with cancelled_after(nodes, monkeypatch, 4):
        bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=3)
    (state,) = bench.folders.output.glob("blockskip/runs/*/state-00000004.safetensors")
    state.unlink()  # a crash would not have written this one
    trained = bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=3)
    assert said(trained)["resumed_at"] == 3
    assert_same(trained[0], expected[0])


def test_with_resume_off_a_run_starts_from_the_beginning(bench):
    residuals = bench.precompute()[0]
    first = bench.train(residuals=residuals, resume=True)
    again = bench.train(residuals=residuals, resume=False)
    assert said(again)["resumed_at"] == 0
    assert_same(again[0], first[0])


def test_a_finished_run_is_known_and_saved_again(bench):
    residuals = bench.precompute()[0]
    first = bench.train(residuals=residuals, resume=True, output_name="loras/a")
    again = bench.train(residuals=residuals, resume=True, output_name="loras/b")
    assert (said(again)["resumed_at"], again[2]) == (3, 3)
    assert_same(again[0], first[0])
    assert (bench.folders.loras / "b_00001_.safetensors").is_file()


def test_more_steps_go_on_from_a_finished_run(bench):
    residuals = bench.precompute()[0]
    expected = uninterrupted(bench, residuals)
    bench.train(residuals=residuals, steps=3, resume=True)
    more = bench.train(residuals=residuals, steps=STEPS, resume=True)
    assert said(more)["resumed_at"] == 3
    assert_same(more[0], expected[0])


@pytest.mark.parametrize(
    ("changes", "same_run"),
    [
        ({}, True), ({"checkpointing": False}, True), ({"activation_budget": 0.5}, True), ({"save_every": 7}, True),
        ({"output_name": "loras/other"}, True), ({"file_format": "kohya"}, True), ({"kept_weights": "streamed"}, True),
        ({"seed": 6}, False), ({"learning_rate": 2e-2}, False), ({"rank": 3}, False), ({"alpha": 9.0}, False),
        ({"warmup_steps": 3}, True), ({"batch_size": 2}, False), ({"targets": "all linear"}, False), ({"weight_decay": 0.0}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_lora_is_another_run(bench, changes, same_run):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, resume=True, steps=1)
    assert said(bench.train(residuals=residuals, resume=True, steps=1, **changes))["resumed_at"] == int(same_run)


def test_other_residuals_are_another_run(bench):
    bench.train(resume=True, steps=1)
    for changes in ({"seed": 9}, {"residual_format": "int8"}, {"patch_max": 48}):
        other = bench.train(residuals=bench.precompute(**changes)[0], resume=True, steps=1)
        assert said(other)["resumed_at"] == 0


def test_safe_points_lie_beside_the_final_file_and_the_newest_stay(bench, nodes):
    bench.train(steps=STEPS, save_every=1, keep_last=2, output_name="loras/toy", resume=True)
    assert sorted(path.name for path in bench.folders.loras.iterdir()) == [
        "toy_00001_.html",
        "toy_00001_.safetensors",
        "toy_00001_step000003.safetensors",
        "toy_00001_step000004.safetensors",
    ]
    states = sorted(path.name for path in bench.folders.output.glob("blockskip/runs/*/*"))
    assert states == ["state-00000004.safetensors", "state-00000005.safetensors"]
    info = bench.apply(lora_name="toy_00001_step000003.safetensors").args[1]
    assert "steps: 3" in info


def test_old_runs_are_removed(bench):
    residuals = bench.precompute()[0]
    for age, seed in enumerate(range(4)):
        bench.train(residuals=residuals, steps=1, seed=seed, resume=True)
        newest = max(bench.folders.output.glob("blockskip/runs/*"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    assert len(list(bench.folders.output.glob("blockskip/runs/*"))) == 3


def test_an_interrupted_run_outlives_finished_ones(bench, nodes, monkeypatch):
    residuals = bench.precompute()[0]
    with cancelled_after(nodes, monkeypatch, 2):
        bench.train(residuals=residuals, steps=STEPS, resume=True)
    for seed in range(11, 15):
        assert said(bench.train(residuals=residuals, steps=1, seed=seed, resume=True))["problems"] == []
    assert said(bench.train(residuals=residuals, steps=STEPS, resume=True))["resumed_at"] == 2


def test_an_interrupted_run_whose_state_is_removed_is_told(bench, nodes, monkeypatch):
    residuals = bench.precompute()[0]
    for seed in range(11, 14):
        with cancelled_after(nodes, monkeypatch, 2):
            bench.train(residuals=residuals, steps=STEPS, seed=seed, resume=True)
    (problem,) = said(bench.train(residuals=residuals, steps=1, resume=True))["problems"]
    assert f"an unfinished run was removed: step 2 of {STEPS}, saved on " in problem


@pytest.mark.parametrize("changes", [{"save_every": -1}, {"keep_last": 0}], ids=str)
def test_numbers_of_safe_points_that_make_no_sense_are_refused(bench, changes):
    with pytest.raises(ValueError, match="save_every must not be negative and keep_last must be at least 1"):
        bench.train(**changes)


# --- start_from --------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(bench):
    """A trained LoRA with a custom alpha, in all forms that are accepted."""
    trained = bench.train(steps=3, rank=4, alpha=8.0, output_name="loras/peft", file_format="peft")[0]
    bench.train(steps=3, rank=4, alpha=8.0, output_name="loras/kohya", file_format="kohya")
    return trained


@pytest.mark.parametrize(("form", "alpha"), [("output", 0.0), ("peft", 8.0), ("kohya", 2.0), ("output", 2.0)])
def test_a_lora_is_trained_further_from_where_it_was(bench, core, earlier, form, alpha):
    lora = earlier if form == "output" else core("hosts.files.lora_files").load_lora_file(f"{form}_00001_.safetensors")
    further = bench.train(steps=1, learning_rate=1e-8, alpha=alpha, weight_decay=0.0, start_from=dict(lora))[0]
    assert further.keys() == earlier.keys()
    for name in (name for name in earlier if name.endswith("lora_up.weight")):
        down = name.replace("lora_up", "lora_down")
        torch.testing.assert_close(further[name] @ further[down], earlier[name] @ earlier[down], atol=1e-5, rtol=1e-4)


def test_its_rank_must_not_be_higher(bench, earlier):
    with pytest.raises(ValueError, match=r"has rank 4, but rank is 3 here\. Set rank to 4 or more"):
        bench.train(rank=3, start_from=earlier)
    further = bench.train(rank=6, steps=1, learning_rate=1e-8, weight_decay=0.0, start_from=dict(earlier))[0]
    for name in (name for name in earlier if name.endswith("lora_up.weight")):
        down = name.replace("lora_up", "lora_down")
        found, expected = (lora[name] @ lora[down] / len(lora[down]) for lora in (further, earlier))  # alpha 1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_it_must_not_change_what_is_not_trained(bench, earlier):
    fewer = bench.precompute(selection=bench.select(front=3, back=2)[0])[0]
    said = r"changes layers that are not trained here .* Apply it to the MODEL with Load LoRA"
    with pytest.raises(ValueError, match=said):
        bench.train(residuals=fewer, start_from=earlier)


def test_it_must_be_for_this_model(bench):
    with pytest.raises(ValueError, match="has nothing for this model"):
        bench.train(start_from={"other.lora_up.weight": torch.zeros(2, 2), "other.lora_down.weight": torch.zeros(2, 2)})


def test_starting_from_another_lora_is_another_run(bench, earlier):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, steps=1, resume=True)
    assert said(bench.train(residuals=residuals, steps=1, resume=True, start_from=earlier))["resumed_at"] == 0


def test_a_file_can_be_trained_further(bench, earlier):
    further = bench.train(steps=1, learning_rate=1e-8, weight_decay=0.0, start_file="peft_00001_.safetensors")[0]
    for name in (name for name in earlier if name.endswith("lora_up.weight")):
        down = name.replace("lora_up", "lora_down")
        torch.testing.assert_close(further[name] @ further[down], earlier[name] @ earlier[down], atol=1e-5, rtol=1e-4)


def test_a_lora_with_more_parts_or_none_is_refused(bench, earlier):
    layer = next(name.removesuffix(".lora_up.weight") for name in earlier if name.endswith("lora_up.weight"))
    dora = {**earlier, f"{layer}.dora_scale": torch.ones(len(earlier[f"{layer}.lora_up.weight"]), 1)}
    with pytest.raises(ValueError, match="is not a plain LoRA"):
        bench.train(start_from=dora)
    with pytest.raises(ValueError, match="has nothing for this model"):
        bench.train(start_from={})


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear"])
def test_where_the_rates_depend_on_the_length_another_length_is_another_run(bench, lr_schedule):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, steps=3, resume=True, lr_schedule=lr_schedule)
    longer = bench.train(residuals=residuals, steps=STEPS, resume=True, lr_schedule=lr_schedule)
    assert said(longer)["resumed_at"] == 0


def test_cancel_in_the_last_step_saves_the_lora_too(bench, nodes, monkeypatch):
    with cancelled_after(nodes, monkeypatch, STEPS):
        bench.train(steps=STEPS, output_name="loras/last")
    assert (bench.folders.loras / "last_00001_.safetensors").is_file()

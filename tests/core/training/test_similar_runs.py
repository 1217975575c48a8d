"""An unfinished run that memory made another one is told of, and no other run is."""

import pytest
import torch
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity, TrainingState
from blockskip_pack.blockskip_core.training.similar_runs import SimilarRun, similar_run

PARTS = {"model": "m", "quantize_kept": "off", "batch_size": 2, "accumulation": 1}


def keep(parent, step, planned=100, **changes):
    identity = RunIdentity({**PARTS, **changes})
    states = Checkpoints(parent / identity.key, identity, every=1, keep=1)
    states.save(TrainingState(step, [0.5], {"x": torch.ones(1)}, {}, planned))
    return parent / identity.key


def found(parent, **changes):
    return similar_run(RunIdentity({**PARTS, **changes}), parent)


def test_the_values_of_both_runs_are_told(tmp_path):
    keep(tmp_path, 30, quantize_kept="4-bit", batch_size=1, accumulation=2, correct_4bit=True)
    assert found(tmp_path) == SimilarRun(
        step=30,
        planned=100,
        then="accumulation 2, batch_size 1, correct_4bit on, quantize_kept 4-bit",
        now="accumulation 1, batch_size 2, correct_4bit off, quantize_kept off",
        by_memory=True,
    )


def test_a_run_of_before_the_correction_is_told_without_the_memory(tmp_path):
    keep(tmp_path, 30)
    told = found(tmp_path, correct_4bit=True)
    assert (told.then, told.now, told.by_memory) == ("correct_4bit off", "correct_4bit on", False)


def test_of_several_the_furthest_is_told(tmp_path):
    for step, size in ((30, 1), (70, 4), (50, 8)):
        keep(tmp_path, step, batch_size=size)
    assert (found(tmp_path).step, found(tmp_path).then) == (70, "batch_size 4")


@pytest.mark.parametrize(
    ("step", "planned", "changes"),
    [
        (100, 100, {"batch_size": 1}),
        (30, None, {"batch_size": 1}),
        (30, 100, {"model": "other"}),
        (30, 100, {"model": "other", "batch_size": 1}),
    ],
    ids=["finished", "planned is not known", "another model", "more differs than memory decides"],
)
def test_other_runs_are_not_told(tmp_path, step, planned, changes):
    keep(tmp_path, step, planned, **changes)
    assert found(tmp_path) is None


def test_a_run_that_resumes_says_nothing(tmp_path):
    keep(tmp_path, 30, batch_size=1)
    keep(tmp_path, 10)
    assert found(tmp_path) is None


def test_without_runs_or_with_damaged_ones_nothing_is_found(tmp_path, caplog):
    assert found(tmp_path / "missing") is None
    folder = keep(tmp_path, 30, batch_size=1)
    (state,) = folder.iterdir()
    state.write_bytes(b"damaged")
    (tmp_path / "file").write_text("no folder")
    assert found(tmp_path) is None
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

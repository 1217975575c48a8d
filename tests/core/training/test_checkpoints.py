"""Training states: a run that was cut off anywhere ends with the same result as an uninterrupted one."""

import dataclasses
import json
import os

import pytest
import torch
from blockskip_pack.blockskip_core import locks
from blockskip_pack.blockskip_core.errors import CheckpointError, InvalidInputError, StorageError
from blockskip_pack.blockskip_core.residuals.sources import source_of
from blockskip_pack.blockskip_core.training import checkpoints as module
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity, TrainingState, remove_old_runs
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import _Loop, train_lora
from blockskip_pack.blockskip_core.training.observer import OnStep
from blockskip_pack.blockskip_core.training.result import TrainingResult
from safetensors.torch import load_file, save_file

from ..plain_dit import PlainDit, lora_for
from ..residuals.test_sources import PLAN, quiet, residual_set
from ..test_files import too_many_open_files

STEPS = 7
ME = RunIdentity({"model": "m", "rank": 2})


class Cut(Exception):
    """A power failure."""


def train(
    folder, checkpoints=None, *, storage="disk", spans=(1, 2), back_residual="constant", cut_after=None, **settings
):
    """Train and return (LoRA, losses, result). The run is interrupted after ``cut_after`` steps."""
    residuals = residual_set(folder, storage, spans=spans, back_residual=back_residual, chunk_size=3)
    dit = PlainDit()
    adapters, result = lora_for(dit, residuals.selection), TrainingResult()
    config = TrainingConfig(**{"steps": STEPS, "learning_rate": 1e-2, **settings})

    def on_step(report):
        if report.step == cut_after:
            raise Cut

    try:
        train_lora(
            dit, PLAN, residuals.latents, residuals.selection, source_of(residuals, dit, quiet), adapters, config,
            result=result, observers=[OnStep(on_step)], checkpoints=checkpoints,
        )  # fmt: skip
    except Cut:
        pass
    return adapters.state_dict(), result


def store(folder, every=1, keep=2, identity=ME):
    return Checkpoints(folder / "run", identity, every=every, keep=keep)


def state(step=3, value=1.0, planned=None):
    return TrainingState(
        step, [0.5, 0.25], {"a": torch.full((2, 3), value), "b": torch.ones(0)}, {"0/step": 3}, planned
    )


def old_runs(parent, **planned):
    """Save a state after step 3 for each name, the first one as the newest: name -> planned steps."""
    for age, (name, steps) in enumerate(planned.items()):
        Checkpoints(parent / name, ME, every=1, keep=1).save(state(planned=steps))
        os.utime(parent / name, (10**9 - age, 10**9 - age))


def names_in(parent):
    return sorted(path.name for path in parent.iterdir())


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_after", range(1, STEPS))
@pytest.mark.parametrize(
    ("storage", "back_residual"),
    [("disk", "constant"), ("chunked", "constant"), ("chunked", "linear"), ("on the fly", "constant")],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path, storage, back_residual, cut_after):
    run = {"storage": storage, "back_residual": back_residual}
    expected, whole = train(tmp_path / "whole", **run)
    train(tmp_path / "cut", store(tmp_path), cut_after=cut_after, **run)
    got, result = train(tmp_path / "cut", store(tmp_path), **run)
    assert_same(got, expected)
    assert result.losses == whole.losses
    assert (result.resumed_at, result.steps) == (cut_after, STEPS)
    assert len(result.step_seconds) == STEPS - cut_after


@pytest.mark.parametrize(
    "settings",
    [{"lr_schedule": "cosine"}, {"lr_schedule": "linear"}, {"lr_schedule": "constant_with_warmup", "warmup_steps": 5},
     {"accumulation": 3}, {"batch_size": 2}, {"optimizer": "AdamW 8-bit (bitsandbytes)"},
     {"optimizer": "Adafactor"}, {"optimizer": "Prodigy (prodigyopt)", "learning_rate": 1.0, "accumulation": 2}],
    ids=str,
)  # fmt: skip
def test_learning_rate_accumulation_and_moments_go_on(tmp_path, settings):
    if "(" in settings.get("optimizer", ""):
        pytest.importorskip(settings["optimizer"].split("(")[1].rstrip(")"))
    expected, _ = train(tmp_path / "whole", **settings)
    train(tmp_path / "cut", store(tmp_path), cut_after=4, **settings)
    assert_same(train(tmp_path / "cut", store(tmp_path), **settings)[0], expected)


def test_a_run_cut_off_between_two_states_goes_on_from_the_last(tmp_path):
    """As after a crash, which writes nothing at the end."""
    expected, _ = train(tmp_path / "whole")
    train(tmp_path / "cut", store(tmp_path, every=2), cut_after=5)
    (tmp_path / "run" / "state-00000005.safetensors").unlink()
    got, result = train(tmp_path / "cut", store(tmp_path, every=2))
    assert result.resumed_at == 4
    assert_same(got, expected)


def test_a_failure_within_an_accumulated_step_goes_on_from_the_step_before(tmp_path, monkeypatch):
    expected, _ = train(tmp_path / "whole", accumulation=3)
    calls, loss = [], _Loop._loss

    def fails_once(self, stretch, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise Cut
        return loss(self, stretch, batch)

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_loss", fails_once)
        _, result = train(tmp_path / "cut", store(tmp_path), accumulation=3)
        assert (result.steps, len(result.losses)) == (2, 7)
    got, result = train(tmp_path / "cut", store(tmp_path), accumulation=3)
    assert result.resumed_at == 2
    assert_same(got, expected)


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_more_steps_go_on_from_a_finished_run(tmp_path, lr_schedule):
    train(tmp_path / "a", store(tmp_path), steps=4)
    got, result = train(tmp_path / "a", store(tmp_path), steps=STEPS, lr_schedule=lr_schedule)
    assert (result.resumed_at, result.steps, len(result.losses)) == (4, STEPS, STEPS)
    if lr_schedule == "constant":
        assert_same(got, train(tmp_path / "whole")[0])


def test_a_finished_run_has_nothing_left_to_do(tmp_path, monkeypatch):
    expected, whole = train(tmp_path / "a", store(tmp_path))
    monkeypatch.setattr(PlainDit, "denoise", None)
    got, result = train(tmp_path / "a", store(tmp_path))
    assert_same(got, expected)
    assert (result.steps, result.losses) == (STEPS, whole.losses)


def test_fewer_steps_take_no_later_state(tmp_path):
    train(tmp_path / "a", store(tmp_path, keep=3))
    got, result = train(tmp_path / "a", store(tmp_path, keep=3), steps=5)
    assert result.resumed_at == 5
    assert_same(got, train(tmp_path / "b", steps=5)[0])
    _, result = train(tmp_path / "a", store(tmp_path, keep=3), steps=2)
    assert result.resumed_at == 0


def test_without_checkpoints_nothing_is_written(tmp_path):
    train(tmp_path / "a")
    assert not (tmp_path / "run").exists()


# --- the files ---------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path):
    store(tmp_path).save(state())
    got = store(tmp_path).newest(3)
    assert (got.step, got.losses, got.numbers) == (3, [0.5, 0.25], {"0/step": 3})
    assert_same(got.tensors, state().tensors)
    assert store(tmp_path).newest(2) is None


def test_the_newest_states_are_kept(tmp_path):
    kept = store(tmp_path, keep=2)
    for step in (1, 5, 12):
        kept.save(state(step))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "state-00000005.safetensors",
        "state-00000012.safetensors",
    ]


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_states_are_due_every_so_many_steps(tmp_path, every, due):
    assert [step for step in range(1, 5) if store(tmp_path, every=every).is_due(step)] == due


def test_a_state_is_written_once(tmp_path, monkeypatch):
    kept = store(tmp_path)
    kept.save(state())
    monkeypatch.setattr(module, "write_atomically", None)
    kept.save(state())
    again = store(tmp_path)
    assert again.newest(9).step == 3
    again.save(state())


@pytest.mark.parametrize("place", [0.0, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.97])
def test_a_flipped_bit_is_found_and_the_state_before_is_taken(tmp_path, place, caplog):
    kept = store(tmp_path)
    kept.save(state(1))
    kept.save(state(2, value=2.0))
    path = tmp_path / "run" / "state-00000002.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    assert store(tmp_path).newest(9).step == 1
    assert not path.exists()
    assert "damaged training state state-00000002.safetensors" in caplog.text


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_off_file_is_found(tmp_path, length):
    store(tmp_path).save(state())
    path = tmp_path / "run" / "state-00000003.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert store(tmp_path).newest(9) is None
    assert not path.exists()


@pytest.mark.parametrize("content", [None, "[]", '{"version": 1}', "{", '"x"', "null"])
def test_a_foreign_file_under_our_name_is_no_state(tmp_path, content):
    path = tmp_path / "run" / "state-00000003.safetensors"
    path.parent.mkdir()
    save_file({"a": torch.zeros(1)}, path, content and {"blockskip": content})
    assert store(tmp_path).newest(9) is None


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("state-1.safetensors", "state-00000009.safetensors.part", "notes.txt"):
        (tmp_path / "run" / name).write_text("mine")
    kept = store(tmp_path, keep=1)
    for step in (1, 2):
        kept.save(state(step))
    assert len(list((tmp_path / "run").iterdir())) == 4


def test_the_state_of_another_run_is_refused_with_what_differs(tmp_path):
    store(tmp_path).save(state())
    other = RunIdentity({"model": "another", "rank": 2, "alpha": 1})
    with pytest.raises(CheckpointError, match=r"belongs to another run: it differs in alpha, model\."):
        store(tmp_path, identity=other).newest(9)


def test_runs_have_a_folder_each():
    names = {RunIdentity({"a": 1}).key, RunIdentity({"a": 2}).key, RunIdentity({"b": 1}).key}
    assert len(names) == 3
    assert RunIdentity({"a": 1, "b": 2}).key == RunIdentity({"b": 2, "a": 1}).key


def test_a_full_disk_leaves_the_earlier_state_and_does_not_end_the_run(tmp_path, monkeypatch):
    expected, _ = train(tmp_path / "whole")
    kept = store(tmp_path)
    written = []

    def full(path, write, write_atomically=module.write_atomically):
        if len(written) == 2:
            raise StorageError("The disk is full.")
        written.append(path)
        write_atomically(path, write)

    monkeypatch.setattr(module, "write_atomically", full)
    got, result = train(tmp_path / "a", kept)
    assert_same(got, expected)
    assert result.problems == ["The disk is full."] * (STEPS - 2 + 1)  # and once more at the end
    assert kept.newest(9).step == 2


def test_old_runs_are_removed_and_strangers_are_not(tmp_path):
    old_runs(tmp_path, **dict.fromkeys("abcde"))
    (tmp_path / "mine").mkdir()
    assert remove_old_runs(tmp_path, keep=2, exclude="d") == []  # nobody knows whether they were finished
    assert names_in(tmp_path) == ["a", "b", "d", "mine"]
    assert remove_old_runs(tmp_path / "nowhere", keep=1, exclude="x") == []


def test_finished_runs_do_not_push_out_unfinished_ones(tmp_path, caplog):
    old_runs(tmp_path, done=3, longer=2, third=3, fourth=3, cut=4)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / module.SAMPLES_FILE).write_text("{}")  # the newest; nothing to continue from
    assert remove_old_runs(tmp_path, keep=2, exclude="me") == []
    assert names_in(tmp_path) == ["cut", "done", "samples"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_unfinished_run_that_is_removed_is_told(tmp_path, caplog):
    old_runs(tmp_path, a=900, b=800, before=None, d=700, done=3)
    told = remove_old_runs(tmp_path, keep=2, exclude="me")
    assert names_in(tmp_path) == ["a", "b", "done"]
    assert len(told) == 1
    assert "an unfinished run was removed: step 3 of 700, saved on 2001-09-" in told[0]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"BlockSkip: {told[0]}"
    ]


def test_runs_that_others_train_now_take_no_place_of_interrupted_ones(tmp_path):
    old_runs(tmp_path, a=9, b=9, c=9, d=9)
    training = [Checkpoints(tmp_path / name, ME, every=1, keep=1).to_itself(lambda step: None) for name in "ab"]
    with training[0], training[1]:
        assert remove_old_runs(tmp_path, keep=2, exclude="me") == []
    assert names_in(tmp_path) == ["a", "b", "c", "d"]


def test_a_damaged_state_counts_as_unfinished(tmp_path):
    old_runs(tmp_path, a=3, b=3)
    (tmp_path / "b" / "state-00000003.safetensors").write_bytes(b"half")
    assert remove_old_runs(tmp_path, keep=1, exclude="me") == []
    assert names_in(tmp_path) == ["a", "b"]


def test_states_say_how_long_their_run_was_planned(tmp_path):
    train(tmp_path, store(tmp_path), cut_after=2)
    assert store(tmp_path).newest(99).planned == STEPS


def test_a_state_of_before_they_said_it_is_read(tmp_path):
    store(tmp_path).save(state(planned=None))
    assert b"planned" not in (tmp_path / "run" / "state-00000003.safetensors").read_bytes()
    found = store(tmp_path).newest(9)
    assert (found.step, found.planned) == (3, None)


def test_a_state_says_in_plain_text_what_it_is(tmp_path):
    from safetensors import safe_open

    store(tmp_path).save(state())
    path = tmp_path / "run" / "state-00000003.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["blockskip"])
    assert (about["step"], about["identity"]) == (3, {"model": "m", "rank": 2})
    assert set(load_file(path)) == {"a", "b", "losses"}


def test_a_lora_of_other_layers_or_rank_is_not_loaded():
    dit = PlainDit()
    adapters = lora_for(dit, residual_set_selection())
    good = adapters.state_dict()
    name, tensor = next(iter(good.items()))
    with pytest.raises(InvalidInputError, match="a layer that is not trained here: x"):
        adapters.load_state_dict({"x": tensor})
    with pytest.raises(InvalidInputError, match="Choose the same rank and targets"):
        adapters.load_state_dict({name: tensor[:1]})
    assert_same(adapters.state_dict(), good)


def residual_set_selection():
    from ..plain_dit import selection

    return selection(1, 2)


def test_states_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ME.parts = {}


def test_a_folder_that_cannot_be_made_does_not_end_the_run(tmp_path):
    expected, _ = train(tmp_path / "whole")
    (tmp_path / "run").write_text("in the way")
    got, result = train(tmp_path / "a", store(tmp_path))
    assert_same(got, expected)
    assert "The folder for training states cannot be created" in result.problems[0]


def test_states_of_a_longer_run_do_not_push_out_those_of_a_shorter_one(tmp_path):
    kept = store(tmp_path, keep=1)
    for step in (400, 500, 100, 200):
        kept.save(state(step))
    assert [int(path.stem[-8:]) for path in sorted((tmp_path / "run").iterdir())] == [200, 500]
    assert store(tmp_path).newest(300).step == 200


def test_nothing_is_saved_of_an_update_that_was_cut_off(tmp_path, monkeypatch):
    real = torch.optim.AdamW.step

    def runs_out_of_memory(self, *args, **kwargs):
        real(self, *args, **kwargs)
        runs_out_of_memory.calls += 1
        if runs_out_of_memory.calls == 3:
            raise Cut

    runs_out_of_memory.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", runs_out_of_memory)
        train(tmp_path / "a", store(tmp_path, every=1))
    assert store(tmp_path).newest(9).step == 2
    assert_same(train(tmp_path / "a", store(tmp_path))[0], train(tmp_path / "whole")[0])


def test_a_state_that_cannot_be_read_now_stays_for_later(tmp_path, monkeypatch):
    """A failing disk or too many open files do not mean damage: they must not cost hours of training."""
    store(tmp_path).save(state())
    said = "cannot be read: .*Too many open files.*Start the run again when the disk is available"
    with too_many_open_files(), pytest.raises(StorageError, match=f"The folder of training states {said}"):
        store(tmp_path).newest(9)
    kept = store(tmp_path)
    found = kept._states()
    monkeypatch.setattr(kept, "_states", lambda: found)
    with too_many_open_files(), pytest.raises(StorageError, match=f"state-00000003.safetensors {said}"):
        kept.newest(9)
    assert store(tmp_path).newest(9).step == 3


def test_a_damaged_state_that_cannot_be_removed_is_said(tmp_path, monkeypatch):
    store(tmp_path).save(state())
    path = tmp_path / "run" / "state-00000003.safetensors"
    path.write_bytes(b"half")

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "unlink", refuse)
    with pytest.raises(StorageError, match="cannot be removed: .*Permission denied"):
        store(tmp_path).newest(9)


# --- more than one process: a lock held by the test keeps the code out like that of another process ------------------


def test_the_same_run_in_another_process_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SECONDS_BETWEEN_TRIES", 0.0)
    ours, theirs, steps = store(tmp_path), store(tmp_path), []

    def waiting(step):
        steps.append(step)
        if len(steps) == 3:
            other.__exit__(None, None, None)
        elif len(steps) == 2:
            theirs.save(state())

    other = theirs.to_itself(steps.append)
    other.__enter__()
    with ours.to_itself(waiting):
        assert steps == [0, 0, state().step]
        assert ours.newest(99).step == state().step
    assert [path.name for path in tmp_path.iterdir()] == [ours._folder.name]


def test_waiting_for_another_process_can_be_interrupted(tmp_path):
    def waiting(step):
        raise KeyboardInterrupt

    with store(tmp_path).to_itself(waiting), pytest.raises(KeyboardInterrupt), store(tmp_path).to_itself(waiting):
        pass


def test_runs_that_another_process_trains_are_not_removed(tmp_path):
    for name in "abc":
        Checkpoints(tmp_path / name, ME, every=1, keep=1).save(state())
    (tmp_path / "gone.lock").touch()
    with Checkpoints(tmp_path / "b", ME, every=1, keep=1).to_itself(lambda step: None):
        remove_old_runs(tmp_path, keep=0, exclude="a")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "b.lock"]


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path):
    ours = store(tmp_path)
    ours.save(state())
    half = ours._folder / "state-00000009.safetensors.0123abcd.part"
    half.write_text("half")
    with ours.to_itself(lambda step: None):
        assert not half.exists()
        assert ours.newest(99) is not None

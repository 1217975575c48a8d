"""Several processes train the LoRA that one process trains, end together, and resume in another number."""

from __future__ import annotations

import functools
import math
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.errors import InvalidInputError, TrainingError
from blockskip_pack.blockskip_core.training import together as together_module
from blockskip_pack.blockskip_core.training.checkpoints import Checkpoints, RunIdentity
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.observer import OnStep
from blockskip_pack.blockskip_core.training.result import TrainingResult
from blockskip_pack.blockskip_core.training.together import Together

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection
from ..processes import in_processes, needs_fork

pytestmark = needs_fork
SIGMAS = tuple(0.1 + 0.11 * index for index in range(8))
PLAN = schedule(SIGMAS, (0, 1) * 4)  # texts of one length: a micro-batch is one backward pass
MIXED = schedule(SIGMAS, (0, 1, 2, 0, 1, 2, 0, 1))
STEPS = 3
UNIT = torch.finfo(torch.float64).eps / 2


def run(
    together,
    *,
    plan=PLAN,
    accumulation=2,
    steps=STEPS,
    folder=None,
    on_step=None,
    spoil=None,
    ema=0.0,
    saves=lambda rank: True,
    **settings,
):
    """Train, and return (LoRA, losses, steps, bytes summed)."""
    dit, chosen, clean = PlainDit(), selection(1, 1), latents(len(plan))
    source = MemorySource(dit, chosen, plan, clean)
    if spoil is not None:
        clean = clean.clone()
        clean[spoil] = math.nan
    adapters, result = lora_for(dit, chosen), TrainingResult()
    states = Checkpoints(folder, RunIdentity({"a": 1}), every=1, keep=9) if folder and saves(together.rank) else None
    settings = {"learning_rate": 1e-2, **settings}
    config = TrainingConfig(steps=steps, batch_size=2, accumulation=accumulation, ema=ema, **settings)
    train_lora(
        dit, plan, clean, chosen, source, adapters, config, result=result, checkpoints=states, together=together,
        observers=[OnStep(on_step)] if on_step else (),
    )  # fmt: skip
    return adapters.state_dict(), result.losses, result.steps, together.reduced_bytes


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "Prodigy (prodigyopt)", "learning_rate": 1.0}], ids=str)
def test_two_processes_with_one_micro_batch_each_train_the_same_bits(tmp_path, settings):
    if settings:
        pytest.importorskip("prodigyopt")
    expected = run(Together(), **settings)
    first, second = in_processes(tmp_path, 2, functools.partial(run, **settings))
    assert (first.error, second.error) == ("", "")
    assert equal(first.result[0], expected[0])
    assert equal(second.result[0], expected[0])
    assert first.result[1:3] == expected[1:3]


def test_all_processes_have_the_moving_average_of_one_process(tmp_path):
    expected = run(Together(), ema=0.5)
    for ended in in_processes(tmp_path, 2, lambda together: run(together, ema=0.5)):
        assert ended.error == ""
        assert equal(ended.result[0], expected[0])
        assert ended.result[1] == expected[1]
    assert not equal(expected[0], run(Together())[0])


@pytest.mark.parametrize("size", [2, 4])
def test_other_orders_of_summing_differ_by_rounding_alone(tmp_path, size):
    expected = run(Together(), accumulation=4, plan=MIXED)
    for ended in in_processes(tmp_path, size, lambda together: run(together, accumulation=4, plan=MIXED)):
        assert ended.error == ""
        assert ended.result[1][:4] == expected[1][:4]  # of the first step, before anything is summed
        torch.testing.assert_close(ended.result[1], expected[1], rtol=1e-12, atol=0.0)
        for name, tensor in expected[0].items():
            torch.testing.assert_close(ended.result[0][name], tensor, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_sums_within_the_stated_bound(tmp_path, size):
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(size, 4, 500, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-8, 4, 3).view(
        4, 1
    )

    def work(together):
        parameters = [torch.nn.Parameter(torch.zeros(20, 25, dtype=torch.float64)) for _ in range(3)]
        for micro_batch in given[together.rank]:
            (parameters[0] * micro_batch.view(20, 25)).sum().backward()
        if together.rank == 0:
            parameters[1].grad = torch.ones_like(parameters[1])
        together.sum_gradients(parameters)
        return [parameter.grad for parameter in parameters], together.reduced_bytes

    one = torch.zeros(500, dtype=torch.float64)
    for micro_batch in given.flatten(0, 1):
        one += micro_batch
    bound = 2 * (4 * size - 1) * UNIT * given.abs().sum((0, 1))
    for ended in in_processes(tmp_path, size, work):
        gradients, reduced = ended.result
        assert ((gradients[0].flatten() - one).abs() <= bound * 1.01).all()
        assert torch.equal(gradients[1], torch.ones(20, 25, dtype=torch.float64))
        assert gradients[2] is None  # no process has one, so nothing is decayed
        assert reduced == (3 * 500 + 3) * 8


def test_numbers_and_texts_arrive_as_they_were(tmp_path):
    numbers = [[0.1, 1e300], [-1e-300, 1 / 3], [math.pi, 5e-324]]
    work = lambda together: (together.in_order(numbers[together.rank]), together.gathered("ä" * together.rank))  # noqa: E731
    for ended in in_processes(tmp_path, 3, work):
        assert ended.result == ([x for row in numbers for x in row], ["", "ä", "ää"])


def test_whole_numbers_of_the_first_process_reach_all(tmp_path):
    numbers = [[3, 2**62, 0], [], [1]]
    for ended in in_processes(tmp_path, 3, lambda together: together.from_first(numbers[together.rank])):
        assert ended.result == numbers[0]
    assert Together().from_first((1, 2)) == [1, 2]


def test_a_killed_process_ends_the_others_with_their_state_saved(tmp_path):
    expected = run(Together(), steps=4)

    def work(together):
        def die(report):
            if report.step == 2 and together.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return run(together, steps=4, folder=tmp_path / "states", on_step=die)

    first, second = in_processes(tmp_path / "killed", 2, work)
    assert second.signal == signal.SIGKILL
    assert first.error.startswith("TrainingError: Process 0 of 2 lost the others: one of them has ended")
    assert sorted(path.name for path in (tmp_path / "states").glob("state-*"))[-1] == "state-00000002.safetensors"
    alone = run(Together(), steps=4, folder=tmp_path / "states")
    assert equal(alone[0], expected[0])
    assert alone[1] == expected[1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_resumes_to_the_same_bits(tmp_path, before, after):
    expected = run(Together(), steps=4)
    states = tmp_path / "states"
    in_processes(tmp_path / "before", before, lambda together: run(together, steps=2, folder=states))
    for ended in in_processes(tmp_path / "after", after, lambda together: run(together, steps=4, folder=states)):
        assert ended.error == ""
        assert equal(ended.result[0], expected[0])
        assert ended.result[1] == expected[1]


def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_one_sentence(tmp_path):
    spoiled = 6  # draws 4 to 7 are those of the second step, and 6 and 7 are the second process's
    first, second = in_processes(tmp_path, 2, lambda together: run(together, spoil=spoiled))
    assert first.error == second.error
    assert first.error.startswith(
        "TrainingError: The loss is not finite in step 2. The LoRA is kept as it was after step 1."
    )


def test_only_the_first_process_writes_states(tmp_path):
    in_processes(tmp_path, 2, lambda together: run(together, folder=tmp_path / f"states-{together.rank}"))
    assert len(list((tmp_path / "states-0").glob("state-*"))) == STEPS
    assert not (tmp_path / "states-1").exists()


def test_states_are_looked_for_after_process_0_has_waited(tmp_path):
    """Another run trains the same and is two steps further when process 0 gets its lock."""
    states = tmp_path / "states"

    def work(together):
        if together.rank == 0:
            time.sleep(1.0)
            run(Together(), steps=2, folder=states)
        return run(together, steps=4, folder=states)

    expected = run(Together(), steps=4)
    for ended in in_processes(tmp_path / "work", 2, work):
        assert ended.error == ""
        assert ended.result[1] == expected[1]


def test_in_training_a_silent_process_is_given_up_and_elsewhere_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(together_module, "STEP_WAIT", timedelta(seconds=1))

    def work(together):
        if together.rank == 1:
            time.sleep(3.0)
        together.gathered("")
        together.from_first([])
        if together.rank == 1:
            time.sleep(3.0)
            return None
        return together.in_order([1.0])

    first, _second = in_processes(tmp_path, 2, work)
    assert first.error.startswith("TrainingError: Process 0 of 2 lost the others")
    assert "or has not answered for too long" in first.error


def test_processes_that_find_different_states_do_not_start(tmp_path):
    run(Together(), steps=1, folder=tmp_path / "states")
    work = lambda together: run(together, folder=tmp_path / "states", saves=lambda rank: rank == 0)  # noqa: E731
    for ended in in_processes(tmp_path, 2, work):
        assert "Process 1 finds another training state than process 0" in ended.error


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(InvalidInputError, match="accumulation must be a multiple .*, got 3 for 2 processes"):
        MicroBatches(steps=1, accumulation=3).share_of(0, 2)


def test_shares_are_the_whole_run_in_its_order():
    whole = MicroBatches(steps=3, batch_size=2, accumulation=6)
    for size in (1, 2, 3, 6):
        shares = [whole.share_of(rank, size) for rank in range(size)]
        for step in range(3):
            dealt = [
                share.draws_of(step * share.per_step + number, 100)
                for share in shares
                for number in range(share.per_step)
            ]
            assert dealt == [whole.draws_of(step * 6 + number, 100) for number in range(6)]


def test_one_process_needs_nobody():
    alone = Together()
    assert alone.in_order([1.0]) == [1.0]
    alone.require_equal("a", lambda rank, first, other: "never")
    assert issubclass(TrainingError, ValueError)

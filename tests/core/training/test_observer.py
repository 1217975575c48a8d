"""Observers of a training run: notified of every step in order, and given time between steps when it is due."""

import pytest
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.loop import train_lora
from blockskip_pack.blockskip_core.training.observer import OnStep, TrainingObserver
from blockskip_pack.blockskip_core.training.result import TrainingResult

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection


class Pause(TrainingObserver):
    """Asks for time after some steps, and records what it sees then."""

    def __init__(self, steps, seen, name="pause", dit=None):
        self.steps, self.seen, self.name, self.dit = steps, seen, name, dit

    def on_step(self, report):
        self.seen.append((self.name, "step", report.step))

    def is_due(self, step):
        return step in self.steps

    def between_steps(self, step):
        self.seen.append((self.name, "pause", step))
        if self.dit is not None:
            assert self.dit.modules_by_name() == self.modules


def run(observers, *, steps=4, accumulation=2, dit=None):
    dit = dit or PlainDit()
    chosen, adapters, result = selection(1, 2), lora_for(dit, selection(1, 2)), TrainingResult()
    config = TrainingConfig(steps=steps, accumulation=accumulation, learning_rate=1e-2)
    source = MemorySource(dit, chosen, schedule(), latents())
    train_lora(dit, schedule(), latents(), chosen, source, adapters, config, result=result, observers=observers)
    return adapters.state_dict(), result


def test_all_are_told_of_each_step_in_their_order():
    seen = []
    run(
        [
            OnStep(lambda report: seen.append(("first", report.step))),
            OnStep(lambda report: seen.append(("then", report.step))),
        ]
    )
    assert seen == [(name, step) for step in range(1, 5) for name in ("first", "then")]


def test_who_is_due_gets_the_time_and_nobody_else():
    seen = []
    run([Pause({0, 2}, seen, "a"), Pause({2, 4}, seen, "b"), TrainingObserver()])
    assert [entry for entry in seen if entry[1] == "pause"] == [
        ("a", "pause", 0), ("a", "pause", 2), ("b", "pause", 2), ("b", "pause", 4),
    ]  # fmt: skip
    assert seen.index(("b", "step", 2)) < seen.index(("a", "pause", 2)) < seen.index(("a", "step", 3))


def test_who_becomes_due_during_a_step_gets_the_time_after_it():
    seen = []
    later = Pause(set(), seen)
    plain, _ = run([])
    asked, _ = run([later, OnStep(lambda report: later.steps.add(3) if report.step == 3 else None)])
    assert seen == [
        ("pause", "step", 1),
        ("pause", "step", 2),
        ("pause", "step", 3),
        ("pause", "pause", 3),
        ("pause", "step", 4),
    ]
    assert all((plain[name] == asked[name]).all() for name in plain)


def test_the_model_is_whole_between_steps():
    dit, seen = PlainDit(), []
    pause = Pause({0, 1, 3}, seen, dit=dit)
    pause.modules = dit.modules_by_name()
    run([pause], dit=dit)
    assert [step for _, what, step in seen if what == "pause"] == [0, 1, 3]


def test_pauses_change_nothing_of_what_is_learned():
    plain, without = run([])
    paused, with_pauses = run([Pause({0, 1, 2, 3, 4}, [])])
    assert all((plain[name] == paused[name]).all() for name in plain)
    assert with_pauses.losses == without.losses
    assert len(without.losses) == len(MicroBatches(steps=4, accumulation=2))


@pytest.mark.parametrize("where", ["on_step", "between_steps"])
def test_an_observer_may_end_the_run(where):
    class Ends(TrainingObserver):
        def is_due(self, step):
            return step == 2

    def end(*_):
        raise KeyboardInterrupt

    observer = Ends()
    setattr(observer, where, end)
    result = TrainingResult()
    dit, chosen = PlainDit(), selection(1, 2)
    with pytest.raises(KeyboardInterrupt):
        train_lora(
            dit, schedule(), latents(), chosen, MemorySource(dit, chosen, schedule(), latents()), lora_for(dit, chosen),
            TrainingConfig(steps=4), result=result, observers=[observer],
        )  # fmt: skip
    assert result.steps == {"on_step": 1, "between_steps": 2}[where]

"""Two ComfyUIs with one output folder: whatever one does, and however it ends, the other ends as if it were alone."""

from __future__ import annotations

import os
import time
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from . import tiny_graph
from .fork_client import Order

SEED = 30
STORAGES = ("disk", "chunked", "on the fly")
RATES = {"the same run": (1e-2, 1e-2), "two learning rates": (1e-2, 2e-2)}
KILLS_OF_ONE = 6
KILLS_OF_BOTH = 3
AGE_S = 3600.0


@pytest.fixture(scope="module")
def alone(fork_server, tmp_path_factory):
    """The run of some settings, alone on its disk; a function. Equal settings run once."""
    found = {}

    def run(storage, rate):
        if (storage, rate) not in found:
            base = tmp_path_factory.mktemp("alone")
            whole = fork_server.run(base, graph(storage, rate))
            assert whole.error is None, whole.sentence
            whole.output = output(base)
            whole.files = {path.name: load_file(path) for path in base.glob("disk/output/loras/*.safetensors")}
            assert set(whole.files) == {
                "toy_00001_.safetensors", "toy_00001_step000003.safetensors", "toy_00001_step000004.safetensors",
            }  # fmt: skip
            found[storage, rate] = whole
        return found[storage, rate]

    return run


def graph(storage, rate):
    return {"storage": storage, "learning_rate": rate}


def output(base):
    """The trainer's LoRA output."""
    return torch.load(base / "output.pt", weights_only=True)


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def orders(tmp_path, storage, rates, kill_after=(None, None), fault=None):
    return [
        Order(tmp_path / f"run {number}", graph(storage, rate), fault, kill_after[number], tmp_path / "disk")
        for number, rate in enumerate(rates)
    ]


def nothing_half_written(tmp_path):
    assert tiny_graph.damaged(tmp_path / "disk") == []


def let_time_pass(tmp_path):
    """Make the leftovers of a killed process as old as when a user returns to the machine."""
    for name in tiny_graph.leftovers(tmp_path):
        then = time.time() - AGE_S
        os.utime(tmp_path / name, (then, then))


def assert_ended_as_if_alone(ended, orders, alone):
    for run, order in zip(ended, orders, strict=True):
        assert run.error is None, run.sentence
        assert run.ui["problems"] == []
        assert is_same(output(order.base), alone(order.graph["storage"], order.graph["learning_rate"]).output)


def assert_files_are_not_mixed(tmp_path, orders, alone, names):
    """Every LoRA, including intermediate saves, equals that of a single run."""
    expected = [alone(order.graph["storage"], order.graph["learning_rate"]).files for order in orders]
    found = {path.name: load_file(path) for path in (tmp_path / "disk" / "output" / "loras").glob("*.safetensors")}
    assert {name for name in found if "step" not in name} == names
    for name in names:
        group = {key.replace(name[:9], "toy_00001"): x for key, x in found.items() if key.startswith(name[:9])}
        assert any(all(is_same(files[key], group[key]) for key in group) for files in expected), name


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("storage", STORAGES)
def test_two_runs_at_once(fork_server, alone, tmp_path, storage, rates):
    both = orders(tmp_path, storage, rates)
    ended = fork_server.run_together(both, lambda: nothing_half_written(tmp_path))
    assert_ended_as_if_alone(ended, both, alone)
    assert_files_are_not_mixed(tmp_path, both, alone, {"toy_00001_.safetensors", "toy_00002_.safetensors"})
    assert tiny_graph.leftovers(tmp_path) == []
    assert sorted(run.ui["resumed_at"] for run in ended) == ([0, 5] if rates[0] == rates[1] else [0, 0])


def test_equal_residuals_are_computed_once(fork_server, tmp_path):
    both = orders(tmp_path, "disk", RATES["two learning rates"], fault={"kind": "record"})
    ended = fork_server.run_together(both)
    assert [run.error for run in ended] == [None, None]
    written = [sum("open" in event and "shard-" in event for event in run.events) for run in ended]
    assert sorted(written)[0] == 0
    assert sorted(written)[1] > 0


@pytest.mark.parametrize("number", range(KILLS_OF_ONE))
def test_one_of_two_is_killed_at_a_random_moment(fork_server, alone, tmp_path, number):
    """The other one ends as if it had been alone; so does the killed one when it is queued again."""
    random = Random(SEED + number)
    storage, rates = STORAGES[number % 2], list(RATES.values())[number // 2 % 2]
    share = (number + random.random()) / KILLS_OF_ONE
    both = orders(tmp_path, storage, rates, (share * 2 * alone(storage, rates[0]).seconds, None))
    ended = fork_server.run_together(both, lambda: nothing_half_written(tmp_path))
    assert_ended_as_if_alone(ended[1:], both[1:], alone)
    nothing_half_written(tmp_path)
    let_time_pass(tmp_path)
    again = orders(tmp_path, storage, rates)[:1]
    assert_ended_as_if_alone(fork_server.run_together(again), again, alone)
    assert tiny_graph.leftovers(tmp_path) == []


@pytest.mark.parametrize("number", range(KILLS_OF_BOTH))
def test_both_are_killed_and_queued_again(fork_server, alone, tmp_path, number):
    random = Random(SEED - 1 - number)
    storage, rates = STORAGES[number % 2], list(RATES.values())[number // 2 % 2]
    longest = 2 * alone(storage, rates[0]).seconds
    for _ in range(2):
        fork_server.run_together(
            orders(tmp_path, storage, rates, (random.uniform(0, longest), random.uniform(0, longest))),
            lambda: nothing_half_written(tmp_path),
        )
    let_time_pass(tmp_path)
    both = orders(tmp_path, storage, rates)
    assert_ended_as_if_alone(fork_server.run_together(both), both, alone)
    assert tiny_graph.leftovers(tmp_path) == []

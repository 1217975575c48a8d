"""A run that is killed at any moment and queued again ends with exactly the same LoRA."""

from __future__ import annotations

import os
import time
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from . import tiny_graph

SEED = 20
STORAGES = ("disk", "chunked")
KILLS_IN_TIME = 6
KILLS_AT_EVENTS = 6
KILLS_IN_A_ROW = 5
AGE_S = 3600.0


@pytest.fixture(scope="module")
def uninterrupted(fork_server, tmp_path_factory):
    """For each storage an uninterrupted run: its LoRA, its duration, and its file system events."""
    found = {}
    for storage in STORAGES:
        base = tmp_path_factory.mktemp("uninterrupted")
        graph = {"storage": storage}
        fork_server.run(base / "first", graph)  # the very first run also does the lazy initialisation
        whole = fork_server.run(base / "whole", graph, {"kind": "record"})
        assert whole.error is None, whole.sentence
        whole.lora = lora_below(base / "whole")
        found[storage] = whole
    return found


def lora_below(base):
    """The newest final file."""
    return load_file(max(base.glob("disk/output/loras/toy_?????_.safetensors")))


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_nothing_half_written(base):
    assert tiny_graph.damaged(base / "disk") == []


def let_time_pass(base):
    """Make the leftovers of the killed process as old as when a user returns to the machine."""
    for name in tiny_graph.leftovers(base):
        then = time.time() - AGE_S
        os.utime(base / name, (then, then))


def queue_again(fork_server, base, graph):
    """Run to the end; every file with its final name is complete at every moment."""
    assert_nothing_half_written(base)
    let_time_pass(base)
    again = fork_server.run(base, graph, meanwhile=lambda: assert_nothing_half_written(base))
    assert again.error is None, again.sentence
    assert_nothing_half_written(base)
    assert tiny_graph.leftovers(base) == []
    return again


@pytest.mark.parametrize("number", range(KILLS_IN_TIME))
def test_killed_at_a_random_moment(fork_server, uninterrupted, tmp_path, number):
    """The moments are spread over the whole run, from the first picture to the summary."""
    storage = STORAGES[number % 2]
    whole = uninterrupted[storage]
    share = (number + Random(SEED + number).random()) / KILLS_IN_TIME
    fork_server.run(
        tmp_path, {"storage": storage}, kill_after=share * whole.seconds,
        meanwhile=lambda: assert_nothing_half_written(tmp_path),
    )  # fmt: skip
    queue_again(fork_server, tmp_path, {"storage": storage})
    assert_same(lora_below(tmp_path), whole.lora)


@pytest.mark.parametrize("number", range(KILLS_AT_EVENTS))
def test_killed_at_an_event_of_the_file_system(fork_server, uninterrupted, tmp_path, number):
    """Between two system calls, or with a file half written: one event of each part of the run."""
    storage = STORAGES[number % 2]
    whole = uninterrupted[storage]
    per_part = len(whole.events) / KILLS_AT_EVENTS
    event = int((number + Random(SEED - number).random()) * per_part)
    killed = fork_server.run(tmp_path, {"storage": storage}, {"kind": "kill", "event": event})
    assert killed.killed, "the run has fewer events than before"
    queue_again(fork_server, tmp_path, {"storage": storage})
    assert_same(lora_below(tmp_path), whole.lora)


@pytest.mark.parametrize("storage", STORAGES)
def test_killed_with_half_of_each_kind_of_file_written(fork_server, uninterrupted, tmp_path, storage):
    """The last file of each kind, cut in half under its temporary name."""
    whole = uninterrupted[storage]
    flushes = dict.fromkeys(("shard-", "manifest", "state-", "step0", "_.safetensors", ".html"))
    for event, name in enumerate(whole.events):
        for kind in flushes:
            if name.startswith("open") and kind in name and "trial" not in name:
                flushes[kind] = event
    assert None not in flushes.values(), flushes
    for kind, event in flushes.items():
        base = tmp_path / kind.strip("_.-")
        killed = fork_server.run(base, {"storage": storage}, {"kind": "kill", "event": event})
        assert killed.killed
        assert_nothing_half_written(base)
        assert tiny_graph.leftovers(base), kind
        queue_again(fork_server, base, {"storage": storage})
        assert_same(lora_below(base), whole.lora)


def test_killed_again_and_again(fork_server, uninterrupted, tmp_path):
    """A run that never gets far still gets to its end."""
    whole, random = uninterrupted["disk"], Random(SEED)
    for _ in range(KILLS_IN_A_ROW):
        fork_server.run(tmp_path, {}, kill_after=random.uniform(0.2, 0.7) * whole.seconds)
        assert_nothing_half_written(tmp_path)
    queue_again(fork_server, tmp_path, {})
    assert_same(lora_below(tmp_path), whole.lora)


def test_the_finished_files_of_earlier_runs_stay_as_they_are(fork_server, tmp_path):
    fork_server.run(tmp_path, {"steps": 2})
    before = {name: digest for name, digest in tiny_graph.digests(tmp_path / "disk").items() if "loras" in name}
    assert len([name for name in before if name.endswith("_.safetensors")]) == 1
    fork_server.run(tmp_path, {"seed": 6}, kill_after=0.3)
    queue_again(fork_server, tmp_path, {"seed": 6})
    now = tiny_graph.digests(tmp_path / "disk")
    assert before.items() <= now.items()

"""The runs in memory: bounded, readable while they grow, and always valid JSON."""

import json
import math
import threading

import pytest
from blockskip_pack.blockskip_core.reporting.run_history import MAX_POINTS_AT_ONCE, RunHistory


@pytest.fixture
def history():
    return RunHistory()


def test_the_news_of_a_run_put_together_are_its_curve(history):
    run, points = history.begin("5", "w"), []
    for step in range(1, 51):
        run.add_step(step, 50, 1.0 / step, 1e-4)
        if step % 7 == 0 or step == 50:
            news = run.news()
            assert news["first"] == len(points)
            points += news["points"]
    assert points == run.snapshot()["points"]
    assert run.news()["points"] == []


def test_news_after_a_long_silence_are_short_and_say_what_is_missing(history):
    run, at_once = history.begin("5", "w"), MAX_POINTS_AT_ONCE
    for step in range(1, at_once + 101):
        run.add_step(step, 1000, 0.5, 1e-4)
    news = run.news()
    assert (len(news["points"]), news["first"]) == (at_once, 100)


def test_earlier_steps_come_first_and_are_no_news(history):
    run = history.begin("5", "w")
    run.add_earlier([0.5, 0.4], 10)
    run.add_step(3, 10, 0.3, 1e-4)
    assert [point[:2] for point in run.snapshot()["points"]] == [(1, 0.5), (2, 0.4), (3, 0.3)]
    assert (run.news()["first"], run.snapshot()["step"]) == (2, 3)


def test_numbers_that_are_not_finite_do_not_come_out(history):
    run = history.begin("5", "w")
    run.add_step(1, 2, math.nan, math.inf)
    run.note(seconds_left=math.nan, memory_now=3, phase="training")
    for told in (run.snapshot(), run.news()):
        json.dumps(told, allow_nan=False)
        assert (told["seconds_left"], told["memory_now"], told["phase"]) == (None, 3, "training")


def test_a_run_takes_the_place_of_the_last_one_of_its_node(history):
    first, second = history.begin("5", "w"), history.begin("5", "w")
    assert first.run != second.run
    assert history.last("5", "w") is second


def test_only_the_newest_runs_are_kept():
    history = RunHistory(limit=3)
    runs = [history.begin(str(node), "w") for node in range(5)]
    assert [history.last(str(node), "w") for node in range(5)] == [None, None, *runs[2:]]


def test_runs_are_told_apart_by_workflow_unless_the_prompt_named_none(history):
    one = history.begin("5", "w")
    assert history.last("5", "other") is None
    assert history.last("5", None) is None
    nameless = history.begin("5", None)
    nameless.started = one.started + 1
    assert history.last("5", "other") is nameless
    assert history.last("5", "w") is nameless
    one.started = nameless.started + 1
    assert history.last("5", "w") is one


def test_readers_see_whole_runs_while_a_writer_writes(history):
    steps, problems, done = 20_000, [], threading.Event()
    run = history.begin("5", "w")

    def read():
        while not done.is_set():
            told = (history.last("5", "w") or run).snapshot()
            numbers = [point[0] for point in told["points"]]
            if len(numbers) > 2000 or (numbers and numbers[-1] != told["count"]) or numbers != sorted(set(numbers)):
                problems.append((told["count"], numbers[-3:]))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(1, steps + 1):
        run.add_step(step, steps, 0.5, 1e-4)
        history.begin("6", "w")
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert run.snapshot()["count"] == steps

"""The data for the trainer's chart: events for every page, the last runs for pages that open later."""

from __future__ import annotations

import asyncio
import importlib
import json
from types import SimpleNamespace

import pytest

PROMPT = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "x"}},
    "2": {"class_type": "BlockSkip_SelectBlocks", "inputs": {"model": ["1", 0], "skip_ratio": 0.5}},
    "4:3": {"class_type": "BlockSkip_PrecomputeResiduals", "inputs": {"selection": ["2", 0]}},
    "4:5": {"class_type": "BlockSkip_TrainLora", "inputs": {"model": ["1", 0], "residuals": ["4:3", 0]}},
    "6": {"class_type": "BlockSkip_ApplyLora", "inputs": {"lora": ["4:5", 0]}},
    "7": {"class_type": "BlockSkip_TrainLora", "inputs": {"residuals": ["4:3", 0], "start_from": ["4:5", 0]}},
}


@pytest.fixture
def live(nodes):
    return importlib.import_module("blockskip_pack.nodes.page.live_chart")


@pytest.fixture
def events(live, monkeypatch):
    """The events of a server that sends nothing, in order; no event is delayed."""
    sent = []
    monkeypatch.setattr(live, "send", lambda data: sent.append(json.loads(json.dumps(data, allow_nan=False))))
    monkeypatch.setattr(live, "SECONDS_BETWEEN_EVENTS", 0.0)
    monkeypatch.setattr(live, "HISTORY", live.RunHistory())
    return sent


def hidden(node="4:5", prompt=PROMPT, workflow="some-id"):
    return SimpleNamespace(unique_id=node, prompt=prompt, extra_pnginfo={"workflow": {"id": workflow}})


def ask(live, **query):
    answer = asyncio.run(live.last_run(SimpleNamespace(query=query)))
    return json.loads(answer.body)["run"]


def test_every_step_of_a_training_is_told_and_kept(bench, events, live):
    output = bench.train(steps=5, accumulation=2, lr_schedule="linear")
    points = [point for event in events for point in event.get("points", [])]
    losses = output[1]["loss"]
    assert [point[0] for point in points] == [1, 2, 3, 4, 5]
    assert [point[1] for point in points] == pytest.approx(
        [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)], rel=1e-5
    )
    assert points[0][3] == pytest.approx(1e-2)
    assert points[4][3] == pytest.approx(2e-3)
    training = [event for event in events if event.get("phase") == "training"]
    assert [event["step"] for event in training] == [1, 2, 3, 4, 5]
    assert all(event["memory_peak"] >= event["memory_now"] > 0 and event["seconds_per_step"] > 0 for event in training)
    assert training[-1]["seconds_left"] == 0
    assert events[-1]["status"] == "done"
    shown = json.loads(json.dumps(output.ui["blockskip_chart"][0], allow_nan=False))
    assert (shown["points"], shown["status"]) == (points, "done")
    assert ask(live, node="1")["run"] == shown["run"] == events[-1]["run"]


def test_a_run_that_goes_on_shows_what_was_done_before(bench, events, live):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, steps=3, resume=True)
    for steps in (3, 5):
        bench.train(residuals=residuals, steps=steps, resume=True)
        kept = ask(live, node="1")
        assert [point[0] for point in kept["points"]] == list(range(1, steps + 1))
        assert (kept["step"], kept["steps"], kept["status"]) == (steps, steps, "done")


def test_how_a_run_ended_is_told(live, events):
    from comfy.model_management import InterruptProcessingException

    def run(error=None):
        with live.LiveChart(hidden()) as chart:
            chart.step(1, 9, 0.5, 1e-4, seconds_left=8.0)
            if error:
                raise error
        return events[-1]["status"]

    assert run() == "done"
    for error, status in ((InterruptProcessingException, "cancelled"), (ValueError, "failed")):
        with pytest.raises(error):
            run(error)
        assert (events[-1]["status"], events[-1]["seconds_left"]) == (status, None)


def test_an_error_is_told_in_its_first_line(live, events):
    with pytest.raises(ValueError, match="Lower"), live.LiveChart(hidden()):
        raise ValueError("Lower `rank`.\nThe rest is for the log.")
    assert events[-1]["message"] == "Lower `rank`."


@pytest.mark.parametrize("resume", [True, False])
def test_cancel_tells_where_the_run_stopped_and_what_was_saved(bench, events, monkeypatch, resume):
    from comfy.model_management import InterruptProcessingException

    line = importlib.import_module("blockskip_pack.blockskip_core.hosts.runs.progress_line")

    def cancel(self, step):
        if step.step == 2:
            raise InterruptProcessingException

    monkeypatch.setattr(line.ProgressLine, "on_step", cancel)
    with pytest.raises(InterruptProcessingException):
        bench.train(steps=5, resume=resume)
    last = events[-1]
    assert (last["status"], last["step"], last["steps"], last["resumes"]) == ("cancelled", 2, 5, resume)
    assert last["saved_as"] in {path.name for path in bench.folders.output.rglob("*.safetensors")}


def ask_summary(live, run):
    return asyncio.run(live.summary(SimpleNamespace(query={"run": run})))


def test_the_summary_of_a_run_is_served_by_its_id_and_nothing_else_is(bench, events, live):
    bench.train()
    run = events[-1]["run"]
    assert events[-1]["summary"] is True
    answer = ask_summary(live, run)
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer._path.suffix == ".html"
    assert answer._path.is_relative_to(bench.folders.output)
    assert str(bench.folders.output) not in json.dumps(events)
    for other in ("", "x", str(answer._path), "../" + run, run + "\0"):
        assert ask_summary(live, other).status == 404
    answer._path.unlink()
    assert ask_summary(live, run).status == 404


def test_no_more_than_four_events_a_second(live, events, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live, "SECONDS_BETWEEN_EVENTS", 0.25)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock.now)
    with live.LiveChart(hidden()) as chart:
        for step in range(1, 101):
            clock.now += 0.01
            chart.step(step, 100, 0.5, 1e-4)
    assert len(events) <= 1 + 4 + 1
    assert sum(len(event["points"]) for event in events) == 100


def test_phases_before_the_trainer_reach_every_trainer_behind(live, events):
    live.announcer(hidden("2"), "selecting")("measuring blocks", 3, 10)
    told = [tuple(event[name] for name in ("node", "phase", "detail", "done", "total")) for event in events]
    assert told == [("4:5", "selecting", "measuring blocks", 3, 10), ("7", "selecting", "measuring blocks", 3, 10)]
    assert all(event["workflow"] == "some-id" and "run" not in event for event in events)


@pytest.mark.parametrize(
    ("node", "trainers"), [("1", ["4:5", "7"]), ("4:5", ["7"]), ("6", []), ("no such node", []), (None, [])]
)
def test_trainers_behind_a_node(live, node, trainers):
    assert live.trainers_behind(PROMPT, node) == trainers


def test_no_trainers_where_there_is_no_prompt(live):
    assert live.trainers_behind({}, "1") == live.trainers_behind(None, "1") == []


@pytest.mark.parametrize(
    "info",
    [None, {}, [], {"workflow": None}, {"workflow": {}}, {"workflow": {"id": 7}}, {"workflow": {"id": ""}},
     {"workflow": {"id": "x" * 1000}}, {"workflow": {"id": "00000000-0000-0000-0000-000000000000"}}],
)  # fmt: skip
def test_a_prompt_without_a_usable_workflow_id_names_none(live, info):
    assert live.workflow_of(SimpleNamespace(extra_pnginfo=info)) is None


def test_the_route_gives_the_last_run_and_nothing_else(live, events):
    with live.LiveChart(hidden()) as chart:
        chart.step(1, 2, float("nan"), 1e-4)
        running = ask(live, node="4:5", workflow="some-id")
        assert (running["status"], running["points"]) == ("running", [[1, None, None, 1e-4]])
    for query in ({}, {"node": "4:5"}, {"node": "4:5", "workflow": "another"}, {"node": "x" * 9999, "workflow": "\0"}):
        assert ask(live, **query) is None


def test_the_routes_are_registered_once(live, monkeypatch):
    from aiohttp.web import RouteTableDef

    table = RouteTableDef()
    monkeypatch.setattr(live.PromptServer, "instance", SimpleNamespace(routes=table), raising=False)
    live.add_routes()
    live.add_routes()
    assert [(route.method, route.path) for route in table] == [
        ("GET", live.ROUTE), ("GET", live.SUMMARY_ROUTE), ("POST", live.SAMPLE_ROUTE),
    ]  # fmt: skip


def test_events_go_to_every_page(live, monkeypatch):
    sent = []
    server = SimpleNamespace(send_sync=lambda *event: sent.append(event))
    monkeypatch.setattr(live.PromptServer, "instance", server, raising=False)
    live.send({"node": "1"})
    assert sent == [("blockskip.train", {"node": "1"})]  # a client id would be a third

"""The chart on the trainer's node: what the server sends and keeps, and the real frontend if there is a Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, WORKFLOWS, browser_or_skip
from .test_workflows import SMALL, part_of, succeed

STEPS = 16
SELECT = {
    "method": "attention mask",
    "probe_size": 64,
    "probe_steps": 1,
    "skip_ratio": 0.2,
    "window_profile": False,
    "seed": 41,
}
HOSTILE = ["", "1' OR 1=1", "../../etc/passwd", "\x00", "<script>", "x" * 3000, "ø", "1:1:1:1"]


@pytest.fixture(scope="module")
def prompt(devtool: Any) -> dict[str, Any]:
    """The training workflow up to the trainer."""
    tools = devtool("comfy_client")
    small = {
        **SMALL, "Select blocks": SELECT, "Train": {"steps": STEPS, "batch_size": 2, "seed": 5},
        "Precompute residuals": {"draws": 6},  # of the usual size, so that a step takes long enough to be watched
    }  # fmt: skip
    return part_of(tools.with_overrides(tools.load_prompt(WORKFLOWS / "train_lora.api.json"), small), "Train")


@pytest.fixture(scope="module")
def trainer(prompt: dict[str, Any]) -> str:
    """The trainer's id."""
    return next(key for key, node in prompt.items() if node["class_type"] == "BlockSkip_TrainLora")


@pytest.fixture(scope="module")
def followed(server: Any, devtool: Any, prompt: dict[str, Any]) -> Any:
    """A run of it."""
    return succeed(devtool("comfy_client").ComfyClient(server.url), prompt)


def last_run(client: Any, **query: str) -> Any:
    return client.get_json(f"/blockskip/last_run?{urllib.parse.urlencode(query)}")["run"]


def test_a_run_is_sent_as_it_goes_and_kept(client: Any, followed: Any, trainer: str) -> None:
    events = [event.data for event in followed.of_kind("blockskip.train") if "run" in event.data]
    points = [point for event in events for point in event["points"]]
    assert [point[0] for point in points] == list(range(1, STEPS + 1))
    assert [event["status"] for event in events].count("done") == 1
    kept = last_run(client, node=trainer)
    assert kept["points"] == points
    assert kept["memory_peak"] >= kept["memory_now"] > 0
    assert followed.outputs[trainer]["blockskip_chart"][0]["points"] == points


def test_what_stands_before_the_trainer_is_announced_on_it(followed: Any, trainer: str) -> None:
    events = [event.data for event in followed.of_kind("blockskip.train")]
    assert {event["node"] for event in events} == {trainer}
    assert {event["phase"] for event in events if "run" not in event} == {"selecting", "precomputing"}


@pytest.mark.parametrize("text", HOSTILE)
def test_the_routes_answer_any_question(client: Any, devtool: Any, text: str) -> None:
    assert last_run(client, node=text, workflow=text) is None
    assert last_run(client) is None
    with pytest.raises(devtool("comfy_client").RequestRefused, match="Only a run in progress"):
        client.post(f"/blockskip/sample_now?{urllib.parse.urlencode({'run': text})}", {"run": text})


def test_the_chart_in_the_real_frontend(server: Any, prompt: dict[str, Any], trainer: str, tmp_path: Path) -> None:
    """Classic and Nodes 2.0, two browsers, reload, cache, subgraph; see the top of check_chart.mjs."""
    browser_or_skip()
    file = tmp_path / "prompt.json"
    fresh = {**prompt[trainer], "inputs": {**prompt[trainer]["inputs"], "seed": 6}}
    file.write_text(json.dumps({**prompt, trainer: fresh}), encoding="utf-8")
    pictures = os.environ.get("BLOCKSKIP_SCREENSHOTS")
    command = ["node", str(ROOT / "devtools" / "check_chart.mjs"), server.url, str(file)]
    command += ["--screenshots", pictures] if pictures else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail(20)}"


ODD_DATA = """
const { readRun, extended, likenessByStep, mostAlike } = await import(process.argv[1]);
const odd = [undefined, null, 7, "x", [], {}, { run: 5 }, { run: "" }];
const points = [[1, 0.5, 0.5, 1e-4], [2, "x", null], "y", null, [null, 1], [NaN, 1], [3, Infinity, 0.4, {}]];
const run = readRun({ run: "a", points, first: -4, step: "z", memory_now: {}, detail: 8, steps: NaN, more: [1] });
const samples = [0.5, "x", NaN, null, undefined].map((likeness, i) => ({ step: 10 * i, prompt: 1, file: "a.png", likeness }));
const alike = [readRun({ run: "a", samples }).samples.map(({ likeness }) => likeness)];
const row = (...all) => all.map(([step, likeness]) => ({ step, likeness }));
for (const some of [row([0, null], [4, null]), row([8, 0.75], [0, 0.5], [4, 1], [4, 0.5], [12, null]), null]) {
  alike.push(likenessByStep(some), mostAlike(likenessByStep(some)));
}
const long = readRun({ run: "a", points: Array.from({ length: 9000 }, (_, i) => [i, 1, 1, 1]) });
console.log(JSON.stringify([odd.map(readRun), run, extended(long, { ...long, points: [[9000, 1, 1, 1]] }).points.length, alike]));
"""


def test_odd_data_is_no_run_or_left_out() -> None:
    """How the page handles data that our server never sends."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    script = ROOT / "web" / "js" / "run_data.js"
    command = ["node", "--no-warnings", "--input-type=module", "-e", ODD_DATA, script.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    odd, run, length, alike = json.loads(done.stdout)
    assert odd == [None] * 8
    assert run["points"] == [[1, 0.5, 0.5, 1e-4], [2, None, None, None], [3, None, 0.4, None]]
    assert [run[name] for name in ("first", "step", "memoryNow", "detail", "steps")] == [0, None, None, "", None]
    assert 2000 < length <= 9001 / 2 + 2
    means = [[0, 0.5], [4, 0.75], [8, 0.75]]
    assert alike == [[0.5, None, None, None, None], [], None, means, [4, 0.75], [], None]

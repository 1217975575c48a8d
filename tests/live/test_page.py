"""What users see in the real frontend, with both kinds of nodes: errors, refusals, Cancel, folded inputs, layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, WORKFLOWS, browser_or_skip
from .test_workflows import SMALL, part_of

RENDERERS = {"classic": [], "vue": ["--vue"]}


@pytest.fixture(scope="module")
def prompt(devtool: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training workflow up to the trainer, as a file."""
    tools = devtool("comfy_client")
    whole = tools.with_overrides(tools.load_prompt(WORKFLOWS / "train_lora.api.json"), SMALL)
    file = tmp_path_factory.mktemp("prompt") / "prompt.json"
    file.write_text(json.dumps(part_of(whole, "Train")), encoding="utf-8")
    return file


def check(tool: str, server: Any, *arguments: str) -> None:
    """Run a tool of ``devtools`` against the server; its findings fail the test."""
    browser_or_skip()
    pictures = os.environ.get("BLOCKSKIP_SCREENSHOTS")
    more = ["--screenshots", pictures] if pictures else []
    command = ["node", str(ROOT / "devtools" / tool), server.url, *arguments, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail(20)}"


@pytest.mark.parametrize("renderer", RENDERERS)
def test_errors_are_told_in_our_words(server: Any, prompt: Path, renderer: str) -> None:
    """As a toast and on the chart: an exception, a refused widget, and Cancel; see the top of check_errors.mjs."""
    check("check_errors.mjs", server, str(prompt), *RENDERERS[renderer])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_nodes_show_few_inputs(server: Any, renderer: str) -> None:
    """Advanced ones are folded away, those set by another node are grey; see the top of check_settings.mjs."""
    check("check_settings.mjs", server, *RENDERERS[renderer])


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("coarse_patches", ["off", "2x and 4x"])
def test_memory_plan_shows_its_bars(server: Any, tmp_path: Path, renderer: str, coarse_patches: str) -> None:
    """As set, as run and for every phase, at the node's own width; see the top of check_plan.mjs."""
    whole = json.loads((WORKFLOWS / "train_12_gb.api.json").read_text(encoding="utf-8"))
    for node in whole.values():
        if node["class_type"] == "BlockSkip_MemoryPlan":
            node["inputs"]["coarse_patches"] = coarse_patches
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(whole), encoding="utf-8")
    check("check_plan.mjs", server, str(file), *RENDERERS[renderer])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_samples_and_summary_are_in_the_chart(server: Any, devtool: Any, tmp_path: Path, renderer: str) -> None:
    """A strip, a large view with a slider, the summary, and a node that keeps its size; see check_samples.mjs."""
    whole = devtool("comfy_client").load_prompt(WORKFLOWS / "train_12_gb.api.json")
    for node in whole.values():
        if "back_residual" in node["inputs"]:  # with residuals of both ends the page shows how far they are
            node["inputs"] |= {"back_residual": "constant", "draws": 12}
        if node["class_type"] == "BlockSkip_TrainLora":  # long enough for the page, which is told four times a second
            node["inputs"]["steps"] = 60
        if node["class_type"] == "BlockSkip_SampleWhileTraining":
            node["inputs"]["every"] = 30
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(part_of(whole, "Dynamic Patch Trainer")), encoding="utf-8")
    check("check_samples.mjs", server, str(file), *RENDERERS[renderer])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_first_hour(server: Any, renderer: str) -> None:
    """The demo's template: a mistake, a run, a sample, Cancel, resuming, the summary, the comparison; see check_first_hour.mjs."""
    check("check_first_hour.mjs", server, *RENDERERS[renderer])


RUN = {"BlockSkip 1 - My first LoRA": "my_first_lora", "BlockSkip 2 - Train 12 GB": "train_12_gb"}
"""Template -> its twin, run to see the layout during and after a run."""
DEMO = ROOT / "demo" / "blockskip_demo_nodes" / "workflows"


@pytest.mark.parametrize("renderer", RENDERERS)
def test_no_node_of_a_template_lies_on_another(server: Any, tmp_path: Path, renderer: str) -> None:
    """When it is opened, while it runs, and after it; see the top of check_layout.mjs."""
    for template, twin in RUN.items():
        shutil.copy(WORKFLOWS / f"{twin}.api.json", tmp_path / f"{template}.json")
    files = [*sorted((ROOT / "workflows").glob("*.json")), *sorted(DEMO.glob("*.json"))]
    check("check_layout.mjs", server, *map(str, files), "--twins", str(tmp_path), *RENDERERS[renderer])


def in_node(script: str, *modules: str) -> Any:
    """Run a script in node with the page's modules as arguments, and return the JSON that it prints."""
    if not shutil.which("node"):
        pytest.skip("needs node")
    files = [(ROOT / "web" / "js" / name).as_uri() for name in modules]
    command = ["node", "--no-warnings", "--input-type=module", "-e", script, *files]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)


TICKS = """
const { ticks } = await import(process.argv[1]);
console.log(JSON.stringify([[0.16, 0.49], [0.0000012, 0.0000034], [-1, 7], [0.33, 0.3301], [2e5, 9e5]].map((range) => ticks(...range))));
"""
ENDS = """
const { lastStep } = await import(process.argv[1]);
console.log(JSON.stringify([1, 9, 10, 37, 39, 79, 160].map((step) => lastStep(step, 160)).concat(lastStep(1, 0), lastStep(300, 160))));
"""


def test_the_curves_axis_has_round_numbers_within_its_range() -> None:
    usual, small, wide, narrow, large = in_node(TICKS, "loss_plot.js")
    assert [words for _, words in usual] == ["0.2", "0.3", "0.4"]
    assert [words for _, words in small] == ["2.0e-6", "3.0e-6"]
    assert [words for _, words in wide] == ["0", "2", "4", "6"]
    assert all(0.33 <= value <= 0.3301 for value, _ in narrow)
    assert len({words for _, words in narrow}) == len(narrow) >= 2
    assert [words for _, words in large] == ["2.0e+5", "4.0e+5", "6.0e+5", "8.0e+5"]


def test_the_curves_axis_ends_with_the_run_or_a_half_of_it() -> None:
    assert in_node(ENDS, "loss_plot.js") == [10, 10, 20, 40, 80, 160, 160, 2, 300]


THINNED = """
const { opacity, thinned } = await import(process.argv[1]);
const dense = Array.from({ length: 9000 }, (_, i) => [i / 30, (i * 7919) % 101]);
const columns = (places) => Map.groupBy?.(places, ([x]) => Math.floor(x / 2)) ?? places.reduce(
  (all, place) => all.set(Math.floor(place[0] / 2), [...(all.get(Math.floor(place[0] / 2)) ?? []), place]), new Map());
const range = (places) => [...columns(places)].map(([, inside]) => [Math.min, Math.max].map((f) => f(...inside.map(([, y]) => y))));
const few = [[0, 3], [1, 1], [5, 2]];
console.log(JSON.stringify([
  thinned(dense).length, JSON.stringify(range(thinned(dense))) === JSON.stringify(range(dense)),
  thinned(dense).every(([x], i, all) => !i || x >= all[i - 1][0]), thinned(few), thinned([]),
  [10, 150, 600, 2400, 1e6].map((count) => opacity(count, 300)),
]));
"""


def test_a_long_curve_is_drawn_thinner_and_reaches_as_high_and_low() -> None:
    count, same_range, ascending, few, none, alphas = in_node(THINNED, "thinning.js")
    assert count <= 4 * 150
    assert same_range
    assert ascending
    assert (few, none) == ([[0, 3], [1, 1], [5, 2]], [])
    assert alphas == pytest.approx([0.4, 0.4, 0.2, 0.13, 0.13])


SPOKEN = """
const { LANGUAGES, languagesOf, say, speak, work } = await import(process.argv[1]);
const gaps = (text) => [...text.matchAll(/\\{(\\w+)\\}/g)].map((gap) => gap[1]).sort().join();
const shapes = Object.values(LANGUAGES).map((texts) => Object.fromEntries(Object.entries(texts).map(([k, v]) => [k, gaps(v)])));
const told = [];
for (const locale of ["en", "zh", "zh-TW", "fr", undefined]) {
  speak(locale);
  told.push([say("chart.progress", { phase: say("phase.precomputing"), done: 8, total: 12 }), work("encoding crops"), work("computing residuals")]);
}
const pages = ["en", "zh", "zh-TW", undefined].map(languagesOf);
console.log(JSON.stringify({ shapes, told, pages, chinese: Object.values(LANGUAGES.zh) }));
"""


def test_every_text_of_the_page_is_in_both_languages() -> None:
    found = in_node(SPOKEN, "words.js")
    english, chinese = found["shapes"]
    assert english == chinese, "the same keys, with the same inserted values"
    assert all(any("\u4e00" <= char <= "\u9fff" for char in text) for text in found["chinese"])
    in_english, in_chinese = (
        ["Precomputing 8 of 12", "encoding crops", "computing residuals"], ["预计算 已完成 8 / 12", "编码裁剪图", "计算残差"],
    )  # fmt: skip
    assert found["told"] == [in_english, in_chinese, in_chinese, in_english, in_english]
    assert found["pages"] == [["en"], ["zh"], ["zh-TW", "zh"], []], "help pages are looked for in the same languages"

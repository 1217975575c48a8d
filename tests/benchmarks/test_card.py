"""The card benchmark: a tiny cell, really run on a card without data and on one with data; resuming; the report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@pytest.fixture
def card(bench: Callable[[str], ModuleType]) -> SimpleNamespace:
    """The benchmark's modules."""
    return SimpleNamespace(main=bench("card"), runs=bench("card_runs"), report=bench("card_report"))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where no card can be emulated."""
    monkeypatch.syspath_prepend(str(ROOT))
    from devtools.card import reason_against

    if reason_against():
        pytest.skip(reason_against())


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_a_card_without_bytes_counts_as_one_with_them(card: SimpleNamespace, comfyui: Path):
    cells = [card.runs.Cell(card.runs.TINY, "bf16", 4.0, with_bytes=with_bytes) for with_bytes in (False, True)]
    without, computed = (card.main.run_cell(cell, comfyui) for cell in cells)
    assert "failed" not in without | computed
    for phase in ("precompute", "resident", "streamed"):
        for name, value in computed[phase].items():
            if isinstance(value, int):  # CPU kernels keep the statistics of a norm in fewer bytes than a card's,
                near = pytest.approx(value, rel=1e-3, abs=64)  # and ComfyUI's 4-bit format keeps a table of 16 numbers
                assert without[phase][name] == near, (phase, name)
    assert without["plan"] == computed["plan"]
    kept = without["resident"]
    assert kept["offloaded"] == kept["left"] == 0
    assert kept["said_peak"] == kept["peak"] > kept["resident"] >= kept["weights"] > 0
    assert without["streamed"]["offloaded"] > without["streamed"]["resident"]
    assert without["streamed"]["peak"] < kept["peak"]


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_weights_can_be_paged(card: SimpleNamespace, comfyui: Path):
    paged = card.main.run_cell(card.runs.Cell(card.runs.TINY, "bf16", 4.0, paged=True), comfyui)
    assert "failed" not in paged, paged
    run = paged["resident"]
    assert run["offloaded"] == run["left"] == 0
    assert 2**25 <= run["resident"] < 2**26 <= run["peak"]  # one page of 32 MiB, and layers that are never paged
    assert "streamed" not in paged


ANSWERS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from devtools.card import Card
from devtools.card.shapes import ShapesCard, zero

card = {"Card": Card, "ShapesCard": ShapesCard}[sys.argv[2]](2**22).install()
ones = torch.ones(2**18, device="cuda")
assert card.memory.used == ones.nbytes
assert type(ones) is torch.Tensor and ones.device == torch.device("cuda", 0)
assert ones[0].item() == 1.0 and ones.isfinite().all() and torch.equal(ones, ones.clone())
there = torch.full((2**18,), 7.0)
card.memory.reset_peak()
there.copy_(ones)
assert card.memory.peak == ones.nbytes, "a copy to the host takes bytes of the card"
assert there.max() == there.min() == (1.0 if sys.argv[2] == "Card" else 0.0)
try:
    torch.empty(2**20, device="cuda")
except torch.OutOfMemoryError as error:
    assert "Tried to allocate 4.00 MiB" in str(error)
else:
    raise AssertionError("more than there is was given")
view = ones.view(512, 512).t()[3:5]
view += 1.0
assert card.memory.used == ones.nbytes and view.untyped_storage()._cdata == ones.untyped_storage()._cdata
del ones, view
assert card.memory.settled() == 0

whole = torch.full((2**21 + 7,), 3, dtype=torch.uint8)
zero(whole[3:-2])
assert whole.nonzero().flatten().tolist() == [0, 1, 2, 2**21 + 5, 2**21 + 6]
"""


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", ["Card", "ShapesCard"])
def test_a_card_without_bytes_answers_like_one_with_them(kind: str):
    done = subprocess.run([sys.executable, "-c", ANSWERS, ROOT, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def row(peak: float = 5.0, **changes: object) -> dict:
    """A finished cell whose training was counted with 4 GiB."""
    run = {
        "counted": 4 * GIB, "peak": int(peak * GIB), "optimiser": GIB, "resident": 3 * GIB, "offloaded": 0, "host": GIB,
        "left": 0, "problems": [],
    }  # fmt: skip
    return {
        "model": "M", "weights": "bf16", "card": 8.0, "paged": False, "with_bytes": False, "about": "today", "selection": (2, 1, 6),
        "plan": {"fits": False, "keeps_all": False, "settings_fit": True, "says": "", "settings": "as small as possible."},
        "precompute": {"counted": GIB, "peak": 2 * GIB, "counted_host": GIB, "host": GIB, "left": 3 * 2**20},
        "resident": run, "streamed": {**run, "peak": GIB}, **changes,
    }  # fmt: skip


def test_a_stopped_run_is_resumed_and_a_failed_cell_is_tried_again(card, tmp_path: Path, monkeypatch):
    file, tried = tmp_path / "card.jsonl", []
    cells = [card.runs.Cell(name, "bf16", 8.0) for name in ("good", "bad")]

    def run_cell(cell: object, comfyui: Path, counts: Path) -> dict:
        tried.append(cell.model)
        return {**row(model=cell.model), **({"failed": "boom"} if len(tried) == 2 else {})}

    monkeypatch.setattr(card.main, "run_cell", run_cell)
    card.main.run(cells, file, tmp_path)
    assert "* bad, bf16, 8 GiB: boom" in card.report.text(card.main.rows_in(file))
    card.main.run(cells, file, tmp_path)
    card.main.run(cells, file, tmp_path)
    assert tried == ["good", "bad", "bad"]
    assert [found["model"] for found in card.main.rows_in(file)] == ["good", "bad"]
    assert "boom" not in card.report.text(card.main.rows_in(file))


def test_a_larger_card_than_one_with_room_for_everything_is_not_run(card):
    cell, roomy = card.runs.Cell("M", "bf16", 16.0), row(card=12.0)
    assert not card.main.is_settled(cell, [roomy])
    roomy["plan"]["keeps_all"] = True
    assert card.main.is_settled(cell, [roomy])
    for other in ({"card": 24.0}, {"weights": "fp8"}, {"paged": True}, {"failed": "boom"}):
        assert not card.main.is_settled(cell, [{**roomy, **other}])
    assert "| 12 and more |" in card.report.text([roomy])


def test_a_process_that_fails_is_told(card, tmp_path: Path, monkeypatch):
    script = tmp_path / "run.py"
    monkeypatch.setattr(card.main, "RUN", script)
    script.write_text("raise SystemExit('no such model')")
    cell = card.runs.Cell("M", "bf16", 8.0)
    assert card.main.run_cell(cell, tmp_path) == {**vars(cell), "failed": "no such model"}
    script.write_text("import json, sys\nprint('chatter')\nprint(json.dumps(json.loads(sys.argv[1]) | {'x': 1}))")
    assert card.main.run_cell(cell, tmp_path) == {**vars(cell), "x": 1}
    assert card.main.cell_of(json.loads(json.dumps(vars(cell)))) == cell


def test_the_report_says_how_far_the_count_is_off_and_what_was_streamed(card):
    refused = row(card=12.0, streamed={"counted": 4 * GIB, "refused": "It was not started.", "left": 0})
    slow = row(card=16.0, peak=3.8)
    slow["resident"] |= {"offloaded": GIB, "problems": ["Weights are moved."]}
    unplanned = row(card=24.0, peak=40.0, paged=True)
    unplanned["plan"] |= {"settings_fit": False}
    unplanned["resident"] |= {"offloaded": GIB}
    del unplanned["streamed"]
    again = row(card=20.0, peak=3.8)
    again["resident"] |= {"problems": ["Weights are moved."]}
    text = card.report.text([row(), refused, slow, again, unplanned])
    assert "* resident: 4 of 4 cells ran; emulated against counted -5.0% to +25.0%" in text
    assert "* streamed: 3 of 4 cells ran; emulated against counted -75.0% to -75.0%" in text
    assert "* weights were streamed in 1 of 4 cells whose settings fit by Memory Plan" in text
    assert "* paged: 1 of 1 cells ran" in text
    assert "at most 3.0 MiB" in text
    assert (
        "**M, bf16**, 2 + 1 of 6 skipped | 8 | too large | as small as possible | 4.00 | **5.00** | 1.00 | +25.0%"
        in text
    )
    assert "| **M, bf16, paged**, 2 + 1 of 6 skipped | 24 | too large | none fit |" in text
    assert "* It was not started. (M, bf16, 12 GiB, streamed)" in text
    assert "* Weights are moved. (M, bf16, 16 GiB, resident; M, bf16, 20 GiB, resident)" in text


def test_every_model_has_a_caption(card):
    for name in (*card.main.MODELS, card.runs.TINY):
        assert card.runs.caption_for(name)[0][0].shape[:2] == (1, card.runs.TEXT_TOKENS)

"""The quality benchmark: a small run of two arms whose order must match the paper's, and its arithmetic."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "demo" / "assets"


@pytest.fixture(scope="module")
def loaded(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The world, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("demo", "benchmarks"):
            patch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module("quality_world").Bench(ASSETS, tmp_path_factory.mktemp("world"))


@pytest.fixture
def small(bench: Callable[[str], ModuleType], loaded: Any, tmp_path: Path) -> SimpleNamespace:
    """The benchmark with few steps, writing to a temporary folder."""
    settings = bench("quality_world").Settings(steps=40, draws=48, held_out=3, prompts=1, sampling_steps=3)
    loaded.results = tmp_path
    return SimpleNamespace(quality=bench("quality"), settings=settings, world=loaded, folder=tmp_path)


def options(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"share": (1, 1), "seeds": [0], "subjects": ["toby"], "arms": [], **changes})


def test_with_residuals_it_learns_and_without_it_does_not(small: SimpleNamespace, bench) -> None:
    import torch

    arms, loss = bench("quality_arms"), {}
    with torch.no_grad():
        for stand_in in ("cached", "nothing"):
            arm = arms.Arm(stand_in, "", views="resize", choice="preset", ratio=0.5, stand_in=stand_in)
            model, _ = small.quality.train(small.world, arm, "toby", 0, small.settings)
            loss[stand_in] = small.world.held_out_loss(model, "toby", arms.SMALL, small.settings)
        base = small.world.held_out_loss(small.world.model, "toby", arms.SMALL, small.settings)
    assert loss["cached"] < base < loss["nothing"]


def test_a_stopped_run_goes_on_and_repeats_nothing(small: SimpleNamespace) -> None:
    small.quality.run(small.world, options(arms=["base"]), small.settings)
    first = rows_in(small.folder)
    small.quality.run(small.world, options(arms=["base"], subjects=["toby", "pip"]), small.settings)
    assert rows_in(small.folder)[: len(first)] == first
    assert [row["subject"] for row in rows_in(small.folder)] == ["toby", "pip"]


def test_every_stand_in_trains_and_starts_from_the_full_model(small: SimpleNamespace, bench) -> None:
    import torch

    arms = bench("quality_arms")
    few = bench("quality_world").Settings(steps=4, draws=8)
    with torch.no_grad():
        for stand_in in ("cached", "on the fly", "refreshed", "diagonal", "linear", "linear, refreshed", "new linear"):
            changes = {"refreshes": 1, "caption_dropout": 0.5}
            arm = arms.Arm("one", "", views="resize", choice="preset", ratio=0.5, stand_in=stand_in, changes=changes)
            _, costs = small.quality.train(small.world, arm, "pip", 0, few)
            assert math.isfinite(costs["loss"])
            assert (costs["front"], costs["back"]) == (4, 2)


def test_the_places_of_the_skipped_blocks_train_too(small: SimpleNamespace, bench, monkeypatch) -> None:
    import torch
    from blockskip_pack.blockskip_core.selection.text_influence import TextInfluence

    arms, few = bench("quality_arms"), bench("quality_world").Settings(steps=4, draws=8)
    front = {n: 10.0 * n for n in range(12)}
    back = {n: 0.0 if n == 0 else 9.0 + 0.001 * n for n in range(12)}
    monkeypatch.setattr(small.quality, "influence", lambda *_: TextInfluence(12, front=front, back=back))
    spans = {}
    with torch.no_grad():
        for name in (arm.name for arm in arms.ARMS if arm.part == arms.WHERE):
            arm = replace(arms.arm_named(name), views="resize")
            _, costs = small.quality.train(small.world, arm, "pip", 0, few)
            assert math.isfinite(costs["loss"])
            spans[name] = bench("quality_report").spans_of(costs)
    assert spans["span before the last block"] == spans["span before the last block, new linear"]
    assert spans["span before the last block"].endswith(", last 1 kept")
    assert spans["front only, half of the bytes"].endswith(" + 0")
    assert "frozen)" in spans["exact back"]
    assert "kept" in spans["cost and influence, half of the bytes"]


def test_a_training_in_other_formats_is_not_copied_from_another_arm(small: SimpleNamespace, bench) -> None:
    def twin(name: str, *others: str) -> str | None:
        return small.quality.twin_of(small.world, name, "toby", small.settings, list(others))

    plain, other = "first 1, last 3, int8, full size", "first 1, last 3, int8, trained in int8, full size"
    assert twin(other, "base", plain) is None
    assert twin(other, other) == other


def test_trained_blocks_in_another_format_cost_fewer_bytes(small: SimpleNamespace, bench) -> None:
    import torch

    arms, few, costs = bench("quality_arms"), bench("quality_world").Settings(steps=2, draws=8), {}
    with torch.no_grad():
        for name in (
            "first 3, last 6, int8, learning rate x 2",
            "first 3, last 6, int8, trained in int8, learning rate x 2",
        ):
            arm = replace(arms.arm_named(f"{name}, full size"), views="resize")
            costs[arm.trained_in] = small.quality.train(small.world, arm, "pip", 0, few)[1]
    assert costs["int8"]["block_bytes"] < 0.7 * costs[""]["block_bytes"]
    assert costs["int8"]["loss"] == pytest.approx(costs[""]["loss"], rel=0.1)


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quality_cells.jsonl").read_text().splitlines()]


def test_two_shares_have_every_cell_once(bench) -> None:
    quality = bench("quality")
    wanted = {"arms": ["base", "x"], "subjects": ["toby", "pip", "mila"], "seeds": [0, 1]}
    whole = list(quality.cells(options(**wanted)))
    halves = [list(quality.cells(options(**wanted, share=(part, 2)))) for part in (1, 2)]
    assert sorted(whole) == sorted(halves[0] + halves[1])
    assert not set(halves[0]) & set(halves[1])


def cells_of(bench, losses: dict[str, float]) -> dict:
    fields = {"cosine": 0.5, "place": 1.0, "ground": 1.0, "saved_bytes": 2**20, "block_bytes": 2**20,
              "step_seconds": 0.1, "front": 1, "back": 2}  # fmt: skip
    return {(arm, "toby", seed): {**fields, "held_out_loss": loss + 0.01 * seed, "held_out_loss_small": loss}
            for arm, loss in losses.items() for seed in (0, 1)}  # fmt: skip


def test_recovered_fraction_is_0_for_the_base_and_1_for_the_full_lora(bench) -> None:
    report, baseline = bench("quality_report"), bench("quality_arms").BASELINE
    cells = cells_of(bench, {"base": 0.4, baseline: 0.3, "no residual": 0.38})
    assert report.recovered(cells, "base", "toby", 0) == pytest.approx(0.0)
    assert report.recovered(cells, baseline, "toby", 0) == pytest.approx(1.0)
    assert report.recovered(cells, "no residual", "toby", 1) == pytest.approx(0.2)
    assert report.recovered(cells, "no residual", "pip", 0) is None


def test_table_and_comparisons_tell_what_was_measured(bench) -> None:
    report, baseline = bench("quality_report"), bench("quality_arms").BASELINE
    cells = cells_of(bench, {"base": 0.4, baseline: 0.3, "skip 50%, patches": 0.32, "no residual": 0.38})
    table = "\n".join(report.table(cells))
    assert (
        "| skip 50%, patches | Table 1 | 1 + 2 | **0.800** ± 0.000 | 0.800 ± 0.000 | 0.50 | 1.00 | 1.00 | 1.0 MiB | 1.0 MiB | 1.00 |"
        in table
    )
    assert "diagonal response" not in table
    assert report.comparisons(cells)[2].startswith(
        "| residuals are needed (Table 2) | +0.600 ± 0.000 | 2 of 2 | +0.600 ± 0.000 | 2 of 2 | +0.000"
    )


def test_every_compared_arm_exists(bench) -> None:
    names = {arm.name for arm in bench("quality_arms").ARMS}
    assert {name for _, *pair in bench("quality_report").CLAIMS for name in pair} <= names
    assert len(names) == len(bench("quality_arms").ARMS)


def test_the_sheet_has_the_rows_whose_pictures_are_all_there(bench, tmp_path):
    sheet = bench("quality_sheet")
    arms = list(sheet.ROWS)
    for arm, prompts in ((arms[0], (0, 1)), (arms[1], (0, 1)), (arms[2], (0,))):
        for subject in ("toby", "pip"):
            for prompt in prompts:
                path = sheet.file_of(tmp_path, arm, subject, 0, prompt)
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (8, 8)).save(path)
    sheet.write(tmp_path, ["toby", "pip"], 2, tmp_path / "sheet.jpg")
    with Image.open(tmp_path / "sheet.jpg") as drawn:
        assert drawn.size == (sheet.LABEL + 4 * sheet.SIDE, sheet.HEAD + 2 * sheet.SIDE)


def test_no_sheet_is_written_without_samples(bench, tmp_path):
    bench("quality_sheet").write(tmp_path, ["toby"], 2, tmp_path / "sheet.jpg")
    assert not (tmp_path / "sheet.jpg").exists()

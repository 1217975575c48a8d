"""The RALU benchmark: counts against closed forms, the report's arithmetic, the picture metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def operations(bench, monkeypatch):
    """The counting code, on a FLUX.1 with 256 features and 2 + 4 blocks."""
    from blockskip_pack.blockskip_core.hosts.families import published_sizes

    counted = bench("ralu_operations")
    size = published_sizes.PUBLISHED_SIZES["FLUX.1-dev"]
    small = {**size.config, "hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 4}
    sizes = {"FLUX.1-dev": published_sizes.PublishedSize(size.supported, small)}
    monkeypatch.setattr(published_sizes, "PUBLISHED_SIZES", sizes)
    monkeypatch.setattr(counted, "PUBLISHED_SIZES", sizes)
    counted.forward.cache_clear()
    yield counted
    counted.forward.cache_clear()


def test_attention_is_counted_apart_from_the_rest(operations):
    """Two products of (text + image)^2 x width in each of six blocks; the rest is linear in the number of tokens."""
    small, large = (operations.forward("FLUX.1-dev", tokens, 8) for tokens in (12, 20))
    assert small.attention == 6 * 4 * 20**2 * 256
    assert large.attention == 6 * 4 * 28**2 * 256
    per_token = 2 * 256 * (2 * 64) + 6 * 2 * 12 * 256**2  # into and out of the model, and twelve squares per block
    assert large.products - small.products == 8 * per_token


def test_stages_are_sums_of_forwards(operations):
    coarse, mixed, full = operations.tokens_of_stages(0.2)
    assert (coarse, mixed, full) == (1024, 1636, 4096)
    parts = [operations.forward("FLUX.1-dev", tokens, 8) for tokens in (coarse, mixed, full)]
    found = operations.staged("FLUX.1-dev", "FLUX 5x", 0.2, 8)
    assert found.total == sum(steps * part.total for steps, part in zip((4, 5, 6), parts, strict=True))
    assert operations.plain("FLUX.1-dev", 50, 8).total == 50 * parts[2].total


def test_the_committed_counts_agree_with_the_paper(bench):
    """Within 3 % for the numbers of text tokens and shares of early regions that the report lists."""
    report, rows = bench("ralu_report"), bench("ralu").rows_in(RESULTS / "ralu.jsonl")
    rows = [row for row in rows if row["part"] == "operations"]
    for what, (tokens, ratio) in report.LIKELY.items():
        assert report.whole_run(rows, what, tokens, ratio, "products") == pytest.approx(report.PAPER[what], rel=1e-3)


def test_the_committed_report_is_that_of_the_committed_rows(bench, tmp_path):
    report, rows = bench("ralu_report"), bench("ralu").rows_in(RESULTS / "ralu.jsonl")
    report.write(rows, tmp_path)
    assert (tmp_path / "ralu.md").read_text("utf-8") == (RESULTS / "ralu.md").read_text("utf-8")


def test_a_part_takes_the_place_of_its_old_rows(bench, tmp_path):
    lines, file = bench("command_line"), tmp_path / "rows.jsonl"
    lines.replace_rows(file, "operations", [{"a": 1}], "today")
    lines.replace_rows(file, "pictures", [{"b": 1}], "today")
    lines.replace_rows(file, "operations", [{"a": 2}, {"a": 3}], "today")
    found = [{key: row[key] for key in row if key != "about"} for row in lines.rows_in(file)]
    assert found == [{"part": "pictures", "b": 1}, {"part": "operations", "a": 2}, {"part": "operations", "a": 3}]
    assert all(json.dumps(row) for row in lines.rows_in(file))


def test_seconds_of_plain_steps_are_worked_out_for_fifty(bench):
    found = bench("ralu_seconds").rows("tiny", 64, plain_steps=2, repeats=1)
    assert [row["name"] for row in found] == ["plain, 50 steps", "FLUX 4x", "FLUX 5x", "FLUX 7x"]
    assert [row["run"] for row in found] == [2, 18, 15, 10]
    assert all(row["ratio"] == pytest.approx(found[0]["seconds"] / row["seconds"]) for row in found)
    assert bench("ralu_report")._seconds([{"about": "here", **row} for row in found])[-1] == "here"


def test_contrast_at_the_borders_of_tokens(bench):
    contrast = bench("ralu_pictures").border_contrast
    ramp = torch.linspace(0, 1, 256)
    smooth = (ramp[:, None] + ramp[None]).expand(1, 3, 256, 256) / 2
    assert contrast(smooth) == pytest.approx(1.0, abs=1e-4)
    blocks = smooth + 0.1 * (torch.arange(256) // 16 % 2)
    assert contrast(blocks) > 5.0

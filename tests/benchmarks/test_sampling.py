"""The benchmark of all ways to sample with fewer operations: its committed rows, against RALU's, and its report."""

from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture
def rows(bench):
    return bench("command_line").rows_in(RESULTS / "sampling.jsonl")


def test_what_ralu_costs_is_what_its_own_benchmark_counted(bench, rows):
    own = [row for row in bench("command_line").rows_in(RESULTS / "ralu.jsonl") if row.get("model") == "FLUX.1-dev"]
    total = {
        row["what"]: row["products"] + row["attention"]
        for row in own
        if row["text_tokens"] == 512 and row["ratio"] in (None, 0.2)
    }
    counted = {row["name"]: row for row in rows if row["part"] == "counted" and row["model"] == "FLUX.1-dev"}
    for preset in ("FLUX 5x", "FLUX 7x"):
        expected = 50 * total[preset] / total["plain"]
        assert counted[f"RALU, {preset}"]["plain_steps"] == pytest.approx(expected, rel=1e-3)


def test_the_committed_report_is_that_of_the_committed_rows(bench, rows, tmp_path):
    bench("sampling_report").write(rows, tmp_path)
    assert (tmp_path / "sampling.md").read_text("utf-8") == (RESULTS / "sampling.md").read_text("utf-8")


def test_the_share_of_the_error_that_pays(bench):
    """Plain steps between whole ones, and the share at which a straight line meets them."""
    report = bench("sampling_report")
    plain = [{"share": None, "plain_steps": steps, "difference": 0.6 / steps} for steps in (2.0, 4.0)]
    assert report.difference_of_plain(plain, 3.0) == pytest.approx((0.3 + 0.15) / 2)
    line = [(share, 0.1 + 0.4 * share) for share in (1.0, 0.5, 0.1)]
    assert report.equal_share(line, 0.2) == pytest.approx(0.25)
    assert report.equal_share(line, 0.1) is None
    assert report.equal_share(line, 0.9) == 1.0


def test_gains_are_prompt_by_prompt_and_plain_steps_are_interpolated(bench):
    report = bench("sampling_report")
    assert report.gain([0.5, 0.9], [0.4, 0.6]) == "+0.200 (± 0.100)"
    assert report.gain([0.5, 0.9], [0.5, 0.9]) == ""
    rows = [
        {"name": f"plain, {steps:g} steps", "plain_steps": steps, "likeness": each[0], "likeness_each": each, "from_full": 1 / steps}
        for steps, each in ((4.0, [0.8, 0.6]), (2.0, [0.4, 0.6]))
    ]  # fmt: skip
    between = report.plain_at(rows, 3.0)
    assert between["likeness_each"] == pytest.approx([0.6, 0.6])
    assert between["from_full"] == pytest.approx(0.375)
    assert [row["name"] for row in report.near([*rows, {**rows[0], "name": "other", "likeness": 0.9}], 4.1)] == [
        "other", "plain, 4 steps",
    ]  # fmt: skip
    names = {
        "plain": "plain, 5 steps", "every other": "DDiT, every other of 7 steps", "by error": "DDiT, by error, 37 steps at 25",
        "third difference": "DDiT, third difference, 37 steps at 25", "EasyCache": "EasyCache 0.1, 50 steps",
        "as published": "DDiT, third difference (as published), 37 steps at 25",
        "RALU": "RALU, FLUX 5x", "two": "RALU, FLUX 5x, first stage by DDiT",
    }  # fmt: skip
    assert {kind: report.kind_of(name) for kind, name in names.items()} == {kind: kind for kind in names}

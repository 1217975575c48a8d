"""The DDiT benchmark: its counts against closed forms, and its report."""

from __future__ import annotations

from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_adapters_parameters_are_those_of_the_layers(bench):
    """LoRA on four layers of a double block and two of a single one, written out for FLUX.1-dev."""
    counted = bench("ddit_operations")
    double = 19 * 32 * 2 * ((3072 + 12288) + (12288 + 3072))
    single = 38 * 32 * ((3072 + 9216 + 12288) + (3072 + 12288 + 3072))
    for scale, numbers in ((2, 256), (4, 1024)):
        ends = numbers * 3072 * 2 + 3072 + numbers + 256 * (numbers + 2) + 256 + 256 * numbers
        assert counted.adapter_parameters(counted.FLUX, scale) == double + single + ends


def test_the_committed_counts_give_the_papers_ratio(bench):
    rows = {
        (row["model"], row["what"]): row
        for row in bench("command_line").rows_in(RESULTS / "ddit.jsonl")
        if row["part"] == "operations"
    }
    for model, paper, scale in (("FLUX.1-dev", 2.18, 2), ("FLUX.1-dev", 2.18, 4), ("Wan2.1-T2V-1.3B", 2.1, 2)):
        own = rows[model, "a step with the model's own patches"]["operations"]
        steps = rows[model, f"coarse steps of 50 for 1/{paper}, all {scale}x"]["steps"]
        coarse = rows[model, f"a step with patches of {scale}x"]["operations"]
        assert 50 * own / (steps * coarse + (50 - steps) * own) == pytest.approx(paper)


def test_counts_by_tokens_are_those_of_the_calls_that_sampling_makes(bench):
    rows = [row for row in bench("command_line").rows_in(RESULTS / "ddit.jsonl") if "call_by_call" in row]
    assert {row["model"] for row in rows} == {"FLUX.1-dev", "Wan2.1-T2V-1.3B"}
    for row in rows:  # the LoRA of FLUX.1's layers for one stream is counted on both
        assert row["ratio"] == pytest.approx(row["call_by_call"], rel=5e-3 if row["model"].startswith("FLUX") else 1e-3)


def test_the_committed_report_is_that_of_the_committed_rows(bench, tmp_path):
    report, rows = bench("ddit_report"), bench("command_line").rows_in(RESULTS / "ddit.jsonl")
    report.write(rows, tmp_path)
    assert (tmp_path / "ddit.md").read_text("utf-8") == (RESULTS / "ddit.md").read_text("utf-8")


def test_trainings_on_other_levels_are_compared_prompt_by_prompt(bench):
    """Two prompts, two levels: 0.3 and 0.5 against 0.2 and 0.65."""
    row = {
        "name": "every other of 20", "prompts": 56, "steps": 75, "unseen": 2, "levels": [0.1, 0.9],
        "everywhere": [[0.2, 0.4], [0.4, 0.6]], "there": [[0.1, 0.3], [0.5, 0.8]],
    }  # fmt: skip
    last = bench("ddit_report").levels([row])[-1]
    assert last == "| every other of 20 | 0.10 to 0.90 | 0.4000 | 0.4250 | +0.0250 (± 0.1250) | 1 of 2 |"

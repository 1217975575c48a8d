"""The benchmark beside another trainer: its table, and the sentence where ComfyUI lacks the model."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest


def test_the_table_has_a_row_for_every_arm_that_was_run(bench):
    rival = bench("rival")
    run = {"counted": 9_000_000_000, "peak": 8_500_000_000, "resident": 7_000_000_000}
    before = {"counted": 0, "peak": 14_000_000_000}
    rows = [{**asdict(arm), "about": "today", "resident": run, "precompute": before} for arm in rival.ARMS]
    text = rival.report(rows)
    assert "| LoRA on all | int8 | 9.00 | 8.50 | 7.00 | 9.9 | - | 14.00 |" in text
    assert "| first 8 skipped, last 8 frozen | 4-bit | 9.00 | 8.50 | 7.00 |  | - | 14.00 |" in text
    assert text.count("| 8.50 |") == len(rival.ARMS) == 6


def test_a_comfyui_without_the_model_is_named_and_nothing_is_written(bench, tmp_path, monkeypatch, caplog):
    rival = bench("rival")
    monkeypatch.setattr(sys, "argv", ["rival.py", "--comfyui", str(tmp_path), "--results", str(tmp_path / "results")])
    rival.main()
    assert "Nothing was run: Qwen-Image-2.1 needs ComfyUI 0.37 or newer." in caplog.text
    assert not list((tmp_path / "results").iterdir())


def test_a_process_gives_its_last_line_as_a_row_or_says_why_not(bench, tmp_path):
    rival, script = bench("rival"), tmp_path / "cell.py"
    script.write_text(
        "import json, os, sys\nprint('loading')\nprint(json.dumps([json.loads(sys.argv[1])['weights'], os.environ['COMFYUI_PATH']]))"
    )
    run = rival.command_line.row_of_process
    assert run(script, rival.ARMS[0], tmp_path) == ["int8", str(tmp_path)]
    script.write_text("raise SystemExit('no card')")
    with pytest.raises(RuntimeError, match="^no card$"):
        run(script, rival.ARMS[0], tmp_path)
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="^status 3$"):
        run(script, rival.ARMS[0], tmp_path)

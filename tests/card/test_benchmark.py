"""The part of the memory benchmark for machines with a card."""

from __future__ import annotations

import json

import pytest

from ..benchmarks.conftest import bench  # noqa: F401  a fixture is used by being there

MIB = 2**20


def test_it_measures_about_what_was_counted_and_names_the_card(card, bench, tmp_path, monkeypatch):  # noqa: F811
    gpu, real = bench("memory_gpu"), bench("memory_real")
    monkeypatch.setattr(real, "DOUBLE", 1)
    monkeypatch.setattr(real, "SINGLE", 2)
    monkeypatch.setattr(gpu, "SKIPPED", (0, 1))
    about = bench("command_line").about(card=card.name)
    gpu.write(gpu.rows_of(real.Lab(), about), tmp_path)
    assert card.name in (tmp_path / "memory_gpu.md").read_text("utf-8")
    rows = [json.loads(line) for line in (tmp_path / "memory_gpu.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["counted"] > 50 * MIB
        assert row["allocated"] == pytest.approx(row["counted"], rel=0.03)

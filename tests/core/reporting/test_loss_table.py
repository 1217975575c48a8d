"""The losses as a table: the mean of each step's micro-batches, smoothed as in the chart, every digit kept."""

from __future__ import annotations

import csv

import pytest
from blockskip_pack.blockskip_core.reporting.loss_curve import LossCurve, smoothing_span
from blockskip_pack.blockskip_core.reporting.loss_table import write_loss_table


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_row_for_every_finished_step(tmp_path, accumulation):
    losses = [0.1 * number**0.5 for number in range(1, 4 * accumulation + 1)] + [9.0] * (accumulation - 1)
    write_loss_table(losses, accumulation, 100, tmp_path / "a.csv")
    head, *table = rows(tmp_path / "a.csv")
    assert head == ["step", "loss", "smoothed"]
    means = [sum(losses[i : i + accumulation]) / accumulation for i in range(0, 4 * accumulation, accumulation)]
    curve = LossCurve(smoothing_span(100))
    points = [curve.add(step, loss) for step, loss in enumerate(means, 1)]
    assert [int(row[0]) for row in table] == [1, 2, 3, 4]
    assert [float(row[1]) for row in table] == means
    assert [float(row[2]) for row in table] == pytest.approx(
        [point[2] for point in points], rel=1e-5
    )  # the chart rounds


def test_no_loss_is_a_table_without_rows(tmp_path):
    write_loss_table([], 2, 10, tmp_path / "a.csv")
    assert rows(tmp_path / "a.csv") == [["step", "loss", "smoothed"]]

"""The loss of every step as a table for spreadsheets (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from .loss_curve import ExponentialMean, smoothing_span


def write_loss_table(losses: Sequence[float], accumulation: int, steps: int, path: Path) -> None:
    """Write the columns step, loss and smoothed; the loss of a step is the mean of its micro-batches.

    Args:
        losses: Loss of every micro-batch, ``accumulation`` for each finished step.
        accumulation: Micro-batches per step.
        steps: Number of steps of the whole run, which the smoothing depends on as in the chart.
        path: The file.

    Raises:
        StorageError: If it cannot be written.
    """
    mean = ExponentialMean(smoothing_span(steps))
    rows: list[tuple[int, float, float | None]] = []
    for step, start in enumerate(range(0, len(losses) - accumulation + 1, accumulation), 1):
        loss = sum(losses[start : start + accumulation]) / accumulation
        rows.append((step, loss, mean.add(loss)))

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("step", "loss", "smoothed"))
            table.writerows(rows)

    write_atomically(path, write)

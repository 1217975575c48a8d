"""The comparison of linear maps: the same held-out draws for every map, and the table."""

from __future__ import annotations

import pytest
import torch

LEVELS = [(7 * index % 80 + 0.5) / 80 for index in range(80)]


def test_maps_are_compared_on_the_same_held_out_draws(bench) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 1, 40, 36, generator=generator, dtype=torch.float64)
    low, high = (torch.randn(36, 36, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [(h, h @ (low if level < 0.5 else high)) for h, level in zip(inputs, LEVELS, strict=True)]
    found = bench("response").errors(LEVELS, pairs)
    assert found["a matrix per band"][1] < 1e-3, "the maps of all bands can be found"
    assert found["one matrix, a mean per band"][1] == pytest.approx(0.5, abs=0.1), "the mean of two unrelated maps"
    numbers, error = found["diagonal and rank 4 per band, equal bytes"]
    assert numbers == 4 * (2 * 4 + 1) * 36 == 36**2
    assert found["a matrix per band"][1] < error < 1.0


def test_the_table_has_the_mean_over_subjects(bench) -> None:
    rows = [{"spans": [0, 6], "errors": {"one": [9, error]}} for error in (0.2, 0.4)]
    assert bench("response").table(rows)[2:] == ["| 0 + 6 | one | 9 | 0.300 (0.200 to 0.400) |"]

"""The benchmark of words: gains, the tables, and that its arms are comparable."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch


def row(group, arm, subject, seed, loss):
    return {
        "group": group, "arm": arm, "subject": subject, "seed": seed, "loss": loss, "forwards": 1440, "seconds": 1.0,
        "cosine": 0.5, "recognised": 0.25,
    }  # fmt: skip


ROWS = [
    row("start", "start", "toby", 0, 0.4), row("start", "start", "pip", 0, 0.6),
    row("gradient", "better", "toby", 0, 0.3), row("gradient", "better", "toby", 1, 0.1), row("gradient", "better", "pip", 0, 0.4),
    row("gradient", "worse", "toby", 0, 0.15), row("gradient", "worse", "pip", 0, 0.55),
    row("defaults", "defaults", "toby", 0, 0.3), row("defaults", "defaults", "toby", 1, 0.2), row("defaults", "defaults", "pip", 0, 0.4),
]  # fmt: skip


def test_gain_is_the_share_of_the_best_gradient_arms_mean(bench) -> None:
    report = bench("words_report")
    scale = report.scale_of(ROWS)
    assert scale == {"toby": pytest.approx((0.4, 0.2)), "pip": pytest.approx((0.6, 0.4))}
    assert [report.gain_of(each, scale) for each in ROWS[-3:]] == pytest.approx([0.5, 1.0, 1.0])
    assert report.scale_of([*ROWS, row("start", "start", "mila", 0, 0.5)]) == scale  # not yet with gradients


def test_the_table_has_a_line_for_each_arm_and_a_number_for_each_seed(bench) -> None:
    lines = bench("words_report").table(ROWS)
    assert "| defaults | 1,440 | 1.00 | 0.50 1.00 | **0.83** | 0.50 | 0.000 | 0.25 | - |" in lines
    assert sum(line.startswith("## ") for line in lines) == 3


def test_curves_are_mean_gains_and_tell_when_a_gain_is_reached(bench) -> None:
    words_curves = bench("words_curves")
    rows = [
        {**row("defaults", "defaults", "toby", 0, 0.2), "curve": [[90, 0.4], [720, 0.3]]},
        {**row("defaults", "defaults", "pip", 0, 0.4), "curve": [[90, 0.5], [720, 0.4]]},
        row("defaults", "defaults", "toby", 1, 0.3),  # without a curve
    ]
    points = words_curves.curves(rows, {"toby": (0.4, 0.2), "pip": (0.6, 0.4)})["defaults"]
    assert points == [(0, 0.0), (90, pytest.approx(0.25)), (720, pytest.approx(0.75)), (1440, pytest.approx(1.0))]
    assert words_curves.passes_to(points, 0.5) == pytest.approx(405)
    assert words_curves.passes_to(points, 1.1) is None
    lines = words_curves.table(rows, {"toby": (0.4, 0.2), "pip": (0.6, 0.4)})
    assert "| defaults (2) | 0.25 | 0.75 | 1.00 |" in lines


def test_a_curve_keeps_words_at_shares_of_the_steps_and_measures_them_later(bench) -> None:
    curve = bench("words_curves").Curve(steps=180, passes=8)
    for step in range(1, 181):
        curve.after(step, torch.tensor([float(step)]))
    assert curve.measured(torch.Tensor.item) == [(n * 8, n) for n in (11, 22, 45, 90, 135)]


def test_the_table_of_formats_says_what_is_refused(bench) -> None:
    measured = {"fp32": (0.9, 0.99, 0.8), "int8": (0.3, 0.8, 0.85), "w4a4": (0.1, 0.2, 0.6)}
    rows = [
        {"group": "formats", "format": name, "agreement": dict(zip(("0.1", "0.2", "0.4"), values, strict=True))}
        for name, values in measured.items()
    ]
    lines = bench("words_report").formats(rows)
    assert lines[4:7] == [
        "| fp32 | 0.90 | 0.99 | 0.80 | 0.2 |", "| int8 | 0.30 | 0.80 | 0.85 | 0.4 |", "| w4a4 | 0.10 | 0.20 | 0.60 | refused |",
    ]  # fmt: skip


def test_every_arm_is_valid_and_takes_about_the_same_number_of_forward_passes(bench) -> None:
    from blockskip_pack.blockskip_core.zoodip.settings import WordSettings

    arms = bench("words_arms")
    assert len({arm.name for arm in arms.ARMS}) == len(arms.ARMS)
    for arm in arms.ARMS:
        if not arm.gradient:
            passes = WordSettings(steps=1, **arm.settings).passes_per_step
            assert arm.forwards - passes < arm.forwards // passes * passes <= arm.forwards


@pytest.mark.parametrize("weight_format", ["int8", "4-bit"])
def test_a_layer_packed_for_the_card_has_the_bytes_that_are_counted(bench, weight_format) -> None:
    from blockskip_pack.blockskip_core.accounting.weight_formats import predicted_bytes, stored_bytes

    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.LayerNorm(80)).half()
    counted = predicted_bytes(model, weight_format)
    bench("words_card").pack(model, weight_format)
    assert sum(map(stored_bytes, model.parameters())) == counted


def test_an_int8_layer_as_in_a_fused_kernel_gives_a_result_of_the_right_shape(bench, monkeypatch) -> None:
    from comfy_kitchen.backends import eager

    monkeypatch.setattr(eager, "int8_linear", eager.int8_linear)  # put back afterwards
    model = torch.nn.Sequential(torch.nn.Linear(96, 80)).half()
    bench("words_card").pack(model, "int8")
    bench("words_card").fuse_int8()
    found = model(torch.ones(2, 3, 96, dtype=torch.float16))
    assert (found.shape, found.dtype) == ((2, 3, 80), torch.float16)


def test_only_the_missing_cells_of_the_card_are_run_and_what_is_wanted_is_that_of_the_count(bench, monkeypatch) -> None:
    card = bench("words_card")
    monkeypatch.setattr(card.command_line, "row_of_process", lambda script, cell, comfyui: asdict(cell))
    first, *others = (asdict(cell) for cell in card.CELLS)
    run = {"group": "card", **first, "weights": "int8", "peak": 2**31, "rows_of_calls": [3], "told": "Counted"}
    assert list(card.rows(None, [{**run, "weights": first["weights"]}])) == others
    names = ("rows", "text_weights", "model_weights", "text_peak", "model_peak", "together", "in_turns", "limit")
    counted = {"group": "memory", "model": first["model"], "side": first["side"], "format": "int8"}
    lines = bench("words_report").memory([{**counted, **dict.fromkeys(names, 2**30)}, run])
    assert "| SD1.5 | int8 | 512 | 3 | together | 4 GiB | 2.00 | 1.00 | 3 | Counted |" in lines


def test_orthogonal_directions_are_right_on_average_and_vary_less(bench) -> None:
    """With mean square d / n in place of (d + n + 1) / n, for a gradient of length 1."""
    numbers, count, times = 6, 4, 4000
    normal = torch.randn(times, count, numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([bench("words_orthogonal").orthogonal(each) for each in normal])
    gram = drawn @ drawn.mT
    torch.testing.assert_close(gram, numbers * torch.eye(count, dtype=torch.float64).expand_as(gram))
    gradient = torch.nn.functional.normalize(torch.arange(1.0, 1.0 + numbers, dtype=torch.float64), dim=0)
    for directions, square in ((normal, (numbers + count + 1) / count), (drawn, numbers / count)):
        found = torch.einsum("tin,ti->tn", directions, directions @ gradient) / count
        torch.testing.assert_close(found.mean(0), gradient, atol=0.05, rtol=0.0)
        assert found.square().sum(1).mean().item() == pytest.approx(square, rel=0.05)

"""The judge of samples: accepts pictures that match their captions, at every size, and reports faults of others."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"


@pytest.fixture
def evaluation(demo) -> ModuleType:
    """The script."""
    return demo("evaluate_world")


def options(tmp_path: Path) -> SimpleNamespace:
    sizes = [(128, 128), (256, 192)]
    return SimpleNamespace(
        assets=ASSETS, count=30, sizes=sizes, steps=1, cfg=1.0, seed=0, sheet=tmp_path / "sheet.png", shown=8
    )


def test_drawn_pictures_pass_and_a_sheet_shows_the_first(evaluation, world, demo, tmp_path, monkeypatch) -> None:
    scenes = {world.caption(scene): scene for scene in demo("world_data").held_out_scenes(30)}

    def drawn(parts, texts, size, options, seed) -> torch.Tensor:
        return demo("world_data").to_tensor([world.render(scenes[text], size) for text in texts]).float() / 255

    monkeypatch.setattr(evaluation, "sample_batch", drawn)
    assert evaluation.judge((), options(tmp_path)) == []
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 256, 2 * (192 + 14))


def test_every_question_below_the_bar_is_named_with_its_size(evaluation, world, tmp_path, monkeypatch) -> None:
    def empty(parts, texts, size, options, seed) -> torch.Tensor:
        return torch.ones(len(texts), 3, size[1], size[0]) / 2

    monkeypatch.setattr(evaluation, "sample_batch", empty)
    below = evaluation.judge((), options(tmp_path))
    assert {"shape at 128 x 128", "place at 128 x 128", "place at 256 x 192", "ground at 256 x 192"} <= set(below)


@pytest.mark.parametrize("text", ["250", "256x", "256x192x64", "0"])
def test_a_size_that_cannot_be_sampled_is_refused(evaluation, text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        evaluation.parsed_size(text)
    assert evaluation.parsed_size("256x192") == (256, 192)
    assert evaluation.parsed_size("320") == (320, 320)

"""The check of the transfer from crops to full pictures: its arithmetic, and that it resumes where it was stopped."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS, RESULTS = ROOT / "demo" / "assets", ROOT / "benchmarks" / "results"


@pytest.fixture
def transfer(bench: Callable[[str], ModuleType]) -> ModuleType:
    """The module."""
    return bench("quality_transfer")


def options(folder: Path, **changes: object) -> Namespace:
    common = {
        "results": folder,
        "assets": None,
        "subjects": ["toby"],
        "seeds": [0],
        "captions": ["plain"],
        "dit": "scenes",
    }
    return Namespace(**{**common, "report": False, **changes})


def test_r_is_the_share_of_the_full_pictures_gain(transfer: ModuleType) -> None:
    assert transfer.recovered({"base": 0.4, "full": 0.3, "crops": 0.32}) == pytest.approx(0.8)
    assert transfer.recovered({"base": 0.4, "full": 0.3, "crops": 0.45}) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="full pictures gained nothing .* train for more steps"):
        transfer.recovered({"base": 0.4, "full": 0.4, "crops": 0.3})


def test_plain_captions_say_neither_size_nor_place(transfer: ModuleType, tmp_path: Path) -> None:
    import torch

    plain, full = (kind(ASSETS, tmp_path) for kind in (transfer.PlainBench, transfer.Bench))
    scene = plain.world.SubjectScene("toby", "water", "left")
    said = plain._captioned(scene)[0][0]
    assert torch.equal(said, plain.conditioning("an orange toby circle on water")[0][0])
    assert not torch.equal(said, full._captioned(scene)[0][0])


def test_a_stopped_check_repeats_nothing(transfer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, str]] = []
    train = transfer.quality.train

    def counted(bench, arm, subject, seed, settings):
        trained.append((arm.name, subject))
        return train(bench, arm, subject, seed, settings)

    monkeypatch.setattr(transfer.quality, "train", counted)
    monkeypatch.setattr(transfer, "recovered", lambda losses: losses["base"] - losses["crops"])
    few = transfer.Settings(steps=2, draws=4, held_out=2, batch_size=2, levels=(0.5,))
    with pytest.raises(SystemExit, match="There is no line yet for toby, seed 0, plain captions: run it"):
        transfer.run(options(tmp_path, report=True), few)
    first = transfer.run(options(tmp_path), few)
    assert trained == [(transfer.BASELINE, "toby"), (transfer.CROPS, "toby")]
    assert transfer.run(options(tmp_path, report=True), few) == first
    transfer.run(options(tmp_path, subjects=["toby", "pip"]), few)
    assert [subject for _, subject in trained] == ["toby"] * 2 + ["pip"] * 2


def test_the_committed_lines_are_of_the_shipped_weights_and_reach_the_bar(transfer: ModuleType, tmp_path: Path) -> None:
    """With the transformer trained on views; those of the one trained on whole scenes do not."""
    means = {}
    for dit in ("views", "scenes"):
        bench = transfer.PlainBench(ASSETS, tmp_path, dit)
        key = transfer.key_of(bench, "plain", transfer.Settings())
        found = [row for row in transfer.command_line.rows_in(RESULTS / transfer.FILE) if row["key"] == key]
        assert [transfer.recovered(row["losses"]["256"]) for row in found] == [row["R_256"] for row in found]
        means[dit] = sum(row["R_256"] for row in found) / len(found)
    assert means["scenes"] < transfer.BAR <= means["views"]

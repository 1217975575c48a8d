"""The transformer's training: an interrupted run continues like an uninterrupted one."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # a hint about speed
ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"


@pytest.fixture
def training(comfyui: Path, demo, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with two tiny buckets that grow after every step."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False)
    data = demo("world_data")
    tiny = (data.Bucket((64, 64), 2, 1.0, 8, 2), data.Bucket((96, 64), 2, 1.0, 8, 2))
    monkeypatch.setattr(data, "BUCKETS", tiny)
    monkeypatch.setattr(data, "GROWTH", 1)
    monkeypatch.setattr(demo("world_views"), "CANVASES", (96, 128, 192))
    return demo("train_world")


def options(folder: Path, steps: int) -> Namespace:
    shutil.copytree(ASSETS, folder / "assets", dirs_exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    start = ASSETS / "blockskip_world_dit.safetensors"
    return Namespace(
        work=folder / "work",
        assets=folder / "assets",
        seed=3,
        steps=steps,
        rate=1e-3,
        optimiser="adam",
        start=start,
        compile=False,
        scale=1,
        large=False,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "work" / "dit.pt")["model"]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(training: ModuleType, tmp_path: Path) -> None:
    device = torch.device("cpu")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    training.train_dit(options(whole, 4), device)
    first = training.DitTraining(options(stopped, 4), device)
    first.advance()
    first.advance()
    first.keep()
    training.train_dit(options(stopped, 4), device)
    expected, got = weights(whole), weights(stopped)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    begun = training.DitTraining(options(whole, 4), device)
    assert begun.step == 4


def test_what_is_written_loads_in_the_loader_and_differs_from_the_start(training: ModuleType, tmp_path: Path) -> None:
    import comfy.sd

    training.train_dit(options(tmp_path, 2), torch.device("cpu"))
    written = tmp_path / "assets" / "blockskip_world_views_dit.safetensors"
    assert written.read_bytes() != (ASSETS / written.name).read_bytes()
    assert comfy.sd.load_diffusion_model(str(written)) is not None


def test_scaled_batches_are_larger_and_take_new_pictures_sooner(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = options(tmp_path, 2)
    changed.scale = 3
    run = training.DitTraining(changed, torch.device("cpu"))
    batches: list[tuple[int, int]] = []
    rows = training.random_rows

    def counted(data, batch, *more):
        batches.append((len(data["ids"]), batch))
        return rows(data, batch, *more)

    monkeypatch.setattr(training, "random_rows", counted)
    run.advance()
    run.advance()
    assert batches == [(8, 6), (16, 6)]


def test_a_large_training_has_whole_scenes_with_full_captions_only(
    training: ModuleType, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = demo("world_data").Bucket((96, 96), 2, 1.0, 8, 2, plain=True)
    monkeypatch.setattr(training, "LARGE", tiny)
    changed = options(tmp_path, 1)
    changed.large = True
    run = training.DitTraining(changed, torch.device("cpu"))
    trained, _ = run.advance()
    assert trained is tiny
    data = run.latents.available(tiny, 0)
    full, nothing = data["ids"][:, 0].tolist(), [0] * data["ids"].shape[-1]

    def said(share: float) -> list[list[int]]:
        return [ids for _ in range(20) for ids in training.random_rows(data, 8, share)[1].tolist()]

    assert all(ids in (*full, nothing) for ids in said(1.0))
    assert not all(ids in (*full, nothing) for ids in said(0.5))


def test_larger_pictures_are_trained_at_noisier_levels(demo) -> None:
    data = demo("world_data")
    shifts = {bucket.size: bucket.shift for bucket in data.BUCKETS}
    assert shifts[128, 128] == 1.8
    assert shifts[128, 128] < shifts[192, 192] < shifts[256, 256] < shifts[320, 320]
    torch.manual_seed(0)
    assert data.random_sigmas(4000, 2.0).mean() > data.random_sigmas(4000, 1.0).mean() + 0.1

"""A changed byte on the disk is found wherever it is, and is never used for training."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch

SEED = 50
DAMAGED_CACHES = 50
DAMAGED_UNFINISHED = 10
DAMAGED_STATES = 20
STEPS = 4
CHUNKS = {"chunk_size": 2}


def flip_a_bit(data, place, random):
    data[place] ^= 1 << random.randrange(8)


def change_a_byte(data, place, random):
    data[place] = (data[place] + random.randrange(1, 256)) % 256


def lose_a_page(data, place, random):
    """As after a crash of the machine: the file has its full length, but one page contains zeros."""
    start = place // 512 * 512
    page = data[start : start + 512]
    data[start : start + 512] = bytes(len(page)) if any(page) else b"\1" * len(page)


def cut_off(data, place, random):
    del data[place:]


def add_to_the_end(data, place, random):
    data += random.randbytes(1 + place % 64)


DAMAGES = (flip_a_bit, change_a_byte, lose_a_page, cut_off, add_to_the_end)


def damage(folder: Path, number: int) -> str:
    """Damage one file below a folder in one place and return a description; equal numbers do the same damage."""
    random = Random(SEED + number)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = random.choices(files, weights=[path.stat().st_size ** 0.5 for path in files])[0]
    data = bytearray(path.read_bytes())
    place = random.randrange(len(data))
    how = DAMAGES[number % len(DAMAGES)]
    before = bytes(data)
    how(data, place, random)
    assert bytes(data) != before
    path.write_bytes(data)
    return f"{how.__name__} at {place} of {path.name}"


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def restored(tmp_path):
    """Restore a folder to its state when this fixture first saw it."""
    kept: dict[Path, Path] = {}

    def restore(folder: Path) -> None:
        if folder not in kept:
            kept[folder] = tmp_path / f"kept {len(kept)}"
            shutil.copytree(folder, kept[folder])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept[folder], folder)

    return restore


@pytest.mark.parametrize("residual_format", ["exact", "int8"])
def test_a_damaged_cache_is_never_trained_on(bench, core, restored, residual_format):
    """It is refused and removed, so queueing again recomputes it; both nodes check it."""
    residuals = bench.precompute(residual_format=residual_format, **CHUNKS)[0]
    expected = bench.train(residuals=residuals, steps=STEPS)[0]
    found = 0
    for number in range(DAMAGED_CACHES):
        restored(residuals.folder)
        what = damage(residuals.folder, number)
        with pytest.raises(core("errors").CacheError, match="They have been removed; run again"):
            pytest.fail(f"{what}: {bench.train(residuals=residuals, steps=STEPS)}")
        assert not residuals.folder.exists(), what
        found += 1
        if number % 10 == 0:
            restored(residuals.folder)
            damage(residuals.folder, number)
            with pytest.raises(core("errors").CacheError, match="They have been removed; run again"):
                bench.precompute(residual_format=residual_format, **CHUNKS)
            again = bench.precompute(residual_format=residual_format, **CHUNKS)[0]
            assert_same(bench.train(residuals=again, steps=STEPS)[0], expected)
    assert found == DAMAGED_CACHES


def test_damage_in_an_unfinished_cache_is_found_and_computed_anew(bench, nodes, core, restored, monkeypatch):
    """An interrupted run only continues after complete shards."""
    import comfy.model_management

    residuals = bench.precompute(**CHUNKS)[0]
    expected = bench.train(residuals=residuals, steps=STEPS)[0]
    shutil.rmtree(residuals.folder)
    show = nodes.precompute_residuals.NodeProgress.__call__

    def cancel(self, phase, done, total, detail=""):
        if phase == "computing residuals" and done > 0.7 * total:
            raise comfy.model_management.InterruptProcessingException
        show(self, phase, done, total, detail)

    with monkeypatch.context() as patch:
        patch.setattr(nodes.precompute_residuals.NodeProgress, "__call__", cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            bench.precompute(**CHUNKS)
    assert len(list(residuals.folder.glob("shard-*"))) == 2
    for number in range(DAMAGED_UNFINISHED):
        restored(residuals.folder)
        what = damage(residuals.folder, number)
        again = bench.precompute(**CHUNKS)[0]
        assert_same(bench.train(residuals=again, steps=STEPS)[0], expected), what


def test_a_damaged_state_is_never_gone_on_from(bench, restored, caplog):
    """The previous state is used, or the run starts over; it ends with the same LoRA."""
    residuals = bench.precompute()[0]
    expected = bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=1, keep_last=3)[0]
    (run,) = bench.folders.output.glob("blockskip/runs/*")
    resumed = []
    for number in range(DAMAGED_STATES):
        restored(run)
        caplog.clear()
        what = damage(run, number)
        trained = bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=1, keep_last=3)
        assert_same(trained[0], expected), what
        resumed.append(trained.ui["blockskip"][0]["resumed_at"])
        if "damaged" in caplog.text:
            assert resumed[-1] == STEPS - 1, what
    assert (
        resumed.count(STEPS - 1) >= DAMAGED_STATES // 4
    )  # three files are damaged in turn, and only the newest is read


def test_with_every_state_damaged_it_starts_from_the_beginning(bench, restored):
    residuals = bench.precompute()[0]
    expected = bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=1, keep_last=3)[0]
    (run,) = bench.folders.output.glob("blockskip/runs/*")
    for path in run.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    trained = bench.train(residuals=residuals, steps=STEPS, resume=True, save_every=1, keep_last=3)
    assert trained.ui["blockskip"][0]["resumed_at"] == 0
    assert_same(trained[0], expected)

"""A node that waits for another ComfyUI says so, and Cancel ends the waiting.

A lock belongs to an open file, so a lock held by the test keeps the nodes out like that of another process.
"""

from __future__ import annotations

import pytest

PATIENCE = 3


@pytest.fixture
def locks(core, monkeypatch):
    module = core("locks")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_TRIES", 0.0)
    return module


@pytest.fixture
def shown(nodes, monkeypatch):
    """The text shown under the node; Cancel is pressed after some waiting."""
    import comfy.model_management

    found = []

    def show(self, text, *, last):
        found.append(text)
        if sum("waiting" in text for text in found) == PATIENCE:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(nodes.train_lora.NodeProgress, "_show", show)
    yield found
    comfy.model_management.interrupt_current_processing(False)


def cancelled():
    import comfy.model_management

    return pytest.raises(comfy.model_management.InterruptProcessingException)


def test_precompute_residuals(bench, locks, shown):
    residuals = bench.precompute()[0]
    (residuals.folder / "manifest.json").unlink()
    bench.vae.encoded = 0
    with locks.try_lock(residuals.folder), cancelled():
        bench.precompute()
    assert shown[-1] == "waiting for another process that computes the same residuals: 1 of 1"
    assert bench.vae.encoded == 0, "no picture is encoded before it is known whether that is needed"


def test_dynamic_patch_trainer(bench, locks, shown):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, steps=2, save_every=1)
    (run,) = (bench.folders.output / "blockskip" / "runs").iterdir()
    before = bench.folders.files()
    with locks.try_lock(run), cancelled():
        bench.train(residuals=residuals, steps=3, save_every=1)
    assert shown[-1] == "waiting for another process that trains the same run: 2 of 3"
    assert bench.folders.files() == before


def test_select_blocks(bench, locks, shown):
    measured = {"method": "attention mask", "vae": bench.vae, "probe_size": 64, "probe_steps": 1}
    bench.select(**measured)
    (file,) = (bench.folders.output / "blockskip" / "probes").iterdir()
    file.unlink()
    with locks.try_lock(file), cancelled():
        bench.select(**measured)
    assert shown[-1].startswith("waiting for another process that measures the same blocks")

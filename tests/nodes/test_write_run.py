"""A run file and the command train what the trainer's node trains, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from .conftest import MANUAL, PATCHES
from .outside import Outside, WideVae, model_in_a_file, newest_lora

ASKED = {
    "steps": 4, "learning_rate": 1e-2, "rank": 4, "seed": 5, "accumulation": 4, "save_every": 2, "loss_table": True
}  # fmt: skip


@pytest.fixture
def outside(nodes, comfyui, folders, prompt, pictures, run_node, tmp_path, monkeypatch):
    """A model in a file, residuals for it, and the nodes and the command on it."""
    import folder_paths

    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(models)], {".safetensors"}))

    def prepare(dtype=torch.float32, **changes):
        model = model_in_a_file(models, dtype)
        selection = run_node(nodes.SelectBlocks, model=model, positive=prompt, **{**MANUAL, "front": 1, "back": 1})[0]
        residuals = run_node(
            nodes.PrecomputeResiduals, model=model, vae=WideVae(), images=pictures, positive=prompt,
            selection=selection, **{**PATCHES, "draws": 10, **changes},
        )[0]  # fmt: skip
        return SimpleNamespace(model=model, residuals=residuals)

    def write(given, **changes):
        out = run_node(nodes.WriteRun, model=given.model, residuals=given.residuals, **{**ASKED, **changes})
        return Path(out[0])

    def train(given, **changes):
        return run_node(nodes.TrainLora, model=given.model, residuals=given.residuals, **{**ASKED, **changes})

    return SimpleNamespace(
        prepare=prepare, write=write, train=train, command=Outside(comfyui, models, folders.output), models=models,
        output=folders.output,
    )  # fmt: skip


def test_the_command_trains_the_lora_of_the_node_bit_for_bit(outside):
    given = outside.prepare()
    run = outside.write(given, resume=False)
    outside.train(given, resume=False)
    expected = newest_lora(outside.output)
    done = outside.command.train(run)
    assert done.code == 0, done.said
    trained = newest_lora(outside.output)
    assert trained != expected
    assert trained.name in done.said
    a, b = load_file(expected), load_file(trained)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert trained.with_suffix(".html").is_file()
    assert trained.with_suffix(".csv").read_text() == expected.with_suffix(".csv").read_text()

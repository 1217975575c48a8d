"""Runs outside ComfyUI, on a tiny model that is in a real file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ..conftest import MANUAL, PATCHES
from .outside import PROGRAM, CommandServer, Outside, WideVae, model_in_a_checkpoint, model_in_a_file

ASKED = {
    "steps": 4, "learning_rate": 1e-2, "rank": 4, "seed": 5, "accumulation": 4, "save_every": 2, "loss_table": True
}  # fmt: skip


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """The command, ready to be carried out."""
    if not hasattr(os, "fork"):
        pytest.skip("copies of a process are made by fork")
    found = CommandServer(comfyui, tmp_path_factory.mktemp("commands"))
    yield found
    found.close()


def linked(models: Path) -> list[str]:
    """What the command says beyond the folder of models, if the model is a link."""
    there = (models / "tiny.safetensors").resolve().parent
    return [] if there == models.resolve() else ["--models", str(there)]


@pytest.fixture
def outside(nodes, comfyui, folders, prompt, pictures, run_node, tmp_path, monkeypatch, server):
    """A model in a file, residuals for it, and the nodes and the command on it."""
    import folder_paths
    from comfy.cli_args import args

    if not args.cpu:
        pytest.skip("bits are compared on the CPU")
    models = tmp_path / "models"
    models.mkdir()
    for kind in ("diffusion_models", "checkpoints"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(models)], {".safetensors"}))

    command = Outside(comfyui, models, folders.output)

    def prepare(dtype=torch.float32, checkpoint=False, **changes):
        model = model_in_a_checkpoint(models) if checkpoint else model_in_a_file(models, dtype)
        selection = run_node(nodes.SelectBlocks, model=model, positive=prompt, **{**MANUAL, "front": 1, "back": 1})[0]
        residuals = run_node(
            nodes.PrecomputeResiduals, model=model, vae=WideVae(), images=pictures, positive=prompt,
            selection=selection, **{**PATCHES, "draws": 10, **changes},
        )[0]  # fmt: skip
        return SimpleNamespace(model=model, residuals=residuals)

    def write(given, flags=(), **changes):
        out = run_node(nodes.WriteRun, model=given.model, residuals=given.residuals, **{**ASKED, **changes})
        run = Path(out[0])
        shown = shlex.split(out[1])
        assert shown[1:] == [str(PROGRAM), *command.arguments(run, *linked(models)), *flags]
        return run

    def train(given, **changes):
        return run_node(nodes.TrainLora, model=given.model, residuals=given.residuals, **{**ASKED, **changes})

    return SimpleNamespace(
        prepare=prepare, write=write, train=train, command=command, models=models,
        output=folders.output, server=server,
    )  # fmt: skip

"""When a node runs again, determined as ComfyUI does: only after a file was rewritten."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

TRAINING = {
    "required": {"model": ["1", 0], "residuals": ["3", 0], "steps": 2, "learning_rate": 1e-4, "rank": 4, "seed": 0},
    "file": "start_file", "linked": {"start_from": ["2", 0], "steps": ["4", 0]},
}  # fmt: skip
GRAPHS = {
    "BlockSkip_ApplyLora": {
        "required": {"model": ["1", 0], "strength_model": 1.0}, "file": "lora_name", "linked": {"lora": ["2", 0]},
    },
    "BlockSkip_TrainLora": TRAINING,
    "BlockSkip_WriteRun": TRAINING,
    "BlockSkip_LoadPatchAdapters": {"required": {}, "file": "file", "linked": {}},
}  # fmt: skip


@pytest.fixture
def key_of(nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., object]:
    """The part of a node's cache key that the node itself provides."""
    import execution
    from comfy_execution.graph import DynamicPrompt

    import nodes as host_nodes

    for node in nodes.NODE_CLASSES:
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)

    def key(kind: str, **inputs: object) -> object:
        required = GRAPHS[kind]["required"] if kind in GRAPHS else {}
        prompt = {"9": {"class_type": kind, "inputs": {**required, **inputs}}}
        with caplog.at_level(logging.WARNING):
            found = asyncio.run(execution.IsChangedCache("p", DynamicPrompt(prompt), None).get("9"))
        assert [record.getMessage() for record in caplog.records] == []
        return found

    return key


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_key_is_the_same_for_the_same_file_and_another_for_another(
    key_of: Callable[..., object], folders: SimpleNamespace, kind: str
) -> None:
    file, chosen = folders.loras / "a.safetensors", {GRAPHS[kind]["file"]: "a.safetensors"}
    save_file({"x": torch.zeros(3)}, file)
    before = key_of(kind, **chosen)
    assert key_of(kind, **chosen) == before
    assert key_of(kind, **chosen, **GRAPHS[kind]["linked"]) == before
    stamp = file.stat()
    save_file({"x": torch.ones(3)}, file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a copy of the same size that keeps the time
    assert key_of(kind, **chosen) != before
    save_file({"x": torch.zeros(3)}, file)
    assert key_of(kind, **chosen) == before, "the same content is the same LoRA"


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", ["none", "absent.safetensors", "../outside.safetensors", ["4", 0]])
def test_without_a_file_there_is_a_key_as_well(
    key_of: Callable[..., object], folders: SimpleNamespace, kind: str, name: object
) -> None:
    save_file({"x": torch.zeros(3)}, folders.output / "outside.safetensors")
    assert key_of(kind, **{GRAPHS[kind]["file"]: name}) == key_of(kind, **{GRAPHS[kind]["file"]: name}) == [""]


def test_a_training_folder_has_another_key_once_a_file_in_it_changes(
    key_of: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    changes: list[Callable[[Path], object]] = [
        lambda folder: (folder / "1.txt").write_text("a toy", encoding="utf-8"),
        lambda folder: (folder / "1.txt").write_text("one toy", encoding="utf-8"),
        lambda folder: (folder / "2.png").write_bytes(b"another picture"),
        lambda folder: (folder / "2.png").rename(folder / "3.png"),
        lambda folder: (folder / "3.png").unlink(),
    ]
    for name in ("toy", "before"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"a picture")
    chosen = {"folder": "toy", "reference_folder": "before"}
    for changed, inputs in (("toy", {"folder": "toy"}), ("toy", chosen), ("before", chosen)):
        for change in changes:
            before = key_of("BlockSkip_LoadTrainingFolder", **inputs)
            assert key_of("BlockSkip_LoadTrainingFolder", **inputs) == before
            change(tmp_path / changed)
            assert key_of("BlockSkip_LoadTrainingFolder", **inputs) != before
        (tmp_path / changed / "1.txt").unlink()


@pytest.mark.parametrize("folder", ["absent", "../outside", ["4", 0]])
def test_without_a_training_folder_there_is_a_key_as_well(
    key_of: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: object
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    first, second = (key_of("BlockSkip_LoadTrainingFolder", folder=folder) for _ in range(2))
    assert first == second


def test_every_node_that_reads_files_by_name_is_tested_here(nodes) -> None:
    own = {node.GET_SCHEMA().node_id for node in nodes.NODE_CLASSES if "fingerprint_inputs" in vars(node)}
    assert own == {*GRAPHS, "BlockSkip_LoadTrainingFolder"}

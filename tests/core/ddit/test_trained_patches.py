"""Adapters as tensors and metadata, and back."""

import json

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.error_table import ErrorTable
from blockskip_pack.blockskip_core.ddit.operations import StepOperations
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.ddit.trained_patches import ModelShape, TrainedPatches, TrainedScale
from blockskip_pack.blockskip_core.errors import PatchAdapterError

BASE = ModelShape("flux", "abc", 1, 3, 8)


def trained():
    scales = {}
    for scale in (2, 4):
        resizing = PatchResizing(1, scale, "bilinear")
        patches = PatchAdapter(3 * scale**2, 8, seed=scale)
        statistics = PatchStatistics.of(torch.randn(4, 3, 8, 8), resizing)
        lora = {"a.b.0": (torch.randn(2, 8), torch.randn(5, 2))}
        tables = ErrorTable((0.2, 0.6), (0.1, 0.2)), ErrorTable((0.2, 0.6), (0.3, 0.4))
        scales[scale] = TrainedScale(CoarseAdapter(resizing, statistics, patches), lora, *tables, steps=30)
    return TrainedPatches(BASE, scales, StepOperations(1.0, 2.0, 3.0, 4), {"prompts": 9})


def test_everything_is_read_back():
    written = trained()
    about = json.loads(json.dumps(written.description()))
    read = TrainedPatches.read(written.tensors(), about)
    assert read.base == written.base
    assert read.operations == written.operations
    assert read.notes == {"prompts": 9}
    assert read.description() == written.description()
    assert read.tensors().keys() == written.tensors().keys()
    assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in written.tensors().items())
    assert read.scales[2].coarse.resizing.kind == "bilinear"
    assert read.scales[4].errors.at(0.4) == pytest.approx(0.15)
    assert read.operations_of(64) == written.operations_of(64)
    assert read.operations_of(64)[2] > written.operations.own(16)


@pytest.mark.parametrize(
    "missing", ["scale_2.patches.bias", "scale_4.statistics.mean", "scale_2.lora.a.b.0.lora_B.weight"]
)
def test_a_missing_tensor_is_one_sentence(missing):
    tensors = trained().tensors()
    del tensors[missing]
    with pytest.raises(PatchAdapterError, match="The patch adapters are damaged"):
        TrainedPatches.read(tensors, trained().description())


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 2},
        {"scales": {"x": {}}},
        {"operations": None},
        {"width": 9},
        {"notes": []},
        {"notes": {"frames": "many", "image_tokens": 9}},
        {"notes": {"frames": 5}},
    ],
)
def test_metadata_that_does_not_fit_is_one_sentence(change):
    about = {**trained().description(), **change}
    with pytest.raises(PatchAdapterError, match="The patch adapters are damaged"):
        TrainedPatches.read(trained().tensors(), about)


def test_a_later_version_is_refused():
    with pytest.raises(PatchAdapterError, match="Expected patch adapters of version 1, got 2. Update this pack."):
        TrainedPatches.read(trained().tensors(), {**trained().description(), "version": 2})

"""The moving average of a LoRA on the trainer: in its files, its samples, its states and its output."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from safetensors import safe_open
from safetensors.torch import load_file

from ..trainings import assert_same, cancelled_after

STEPS = 4
DECAY = 0.2
EVERY = {"steps": STEPS, "save_every": 1, "keep_last": STEPS, "file_format": "peft"}


def lora_files(folders, name):
    """The LoRA after every step but the last, and at the end."""
    steps = [folders.loras / f"{name}_00001_step{step:06}.safetensors" for step in range(1, STEPS)]
    return [load_file(path) for path in [*steps, folders.loras / f"{name}_00001_.safetensors"]]


def closed_form(values):
    """The weighted sum of the values after each step, for tensors that are zero at first."""
    decays = [min(DECAY, (1 + n) / (10 + n)) for n in range(1, len(values) + 1)]
    return sum((1 - decays[n]) * math.prod(decays[n + 1 :]) * x.double() for n, x in enumerate(values))


def test_all_files_hold_the_closed_form_of_the_raw_values(bench):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, output_name="loras/raw", **EVERY)
    trained = bench.train(residuals=residuals, output_name="loras/mean", ema=DECAY, **EVERY)
    raw, mean = lora_files(bench.folders, "raw"), lora_files(bench.folders, "mean")
    ups = [name for name in raw[0] if "lora_B" in name]
    assert ups
    for step in range(1, STEPS + 1):
        for name in ups:
            expected = closed_form([file[name] for file in raw[:step]])
            torch.testing.assert_close(mean[step - 1][name].double(), expected, rtol=1e-5, atol=1e-8)
    assert trained[0].metadata["ema"] == DECAY
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5


def test_cancel_saves_the_average_and_queueing_again_goes_on_to_the_same_one(bench, nodes, monkeypatch):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, output_name="loras/whole", ema=DECAY, **EVERY)
    shutil.rmtree(bench.folders.output / "blockskip" / "runs")
    with cancelled_after(nodes, monkeypatch, 2):
        bench.train(residuals=residuals, output_name="loras/cut", ema=DECAY, resume=True, **{**EVERY, "save_every": 0})
    whole = lora_files(bench.folders, "whole")
    assert_same(load_file(bench.folders.loras / "cut_00001_.safetensors"), whole[1])
    again = bench.train(residuals=residuals, output_name="loras/cut", ema=DECAY, resume=True, **EVERY)
    assert again.ui["blockskip"][0]["resumed_at"] == 2
    assert_same(load_file(bench.folders.loras / "cut_00002_.safetensors"), whole[-1])


def test_without_it_files_and_the_name_of_the_run_are_those_of_before(bench):
    bench.train(ema=0.0, output_name="loras/a")
    (run,) = bench.folders.output.glob("blockskip/runs/*")
    with safe_open(next(run.glob("state-*")), "pt") as state:
        about = json.loads(state.metadata()["blockskip"])
        assert not [name for name in state.keys() if name.startswith("average/")]
    assert "ema" not in about["identity"]
    with safe_open(bench.folders.loras / "a_00001_.safetensors", "pt") as file:
        assert not {"ema", "dropped_captions"} & set(file.metadata())
    bench.train(ema=0.5)
    assert len(list(bench.folders.output.glob("blockskip/runs/*"))) == 2


@pytest.mark.parametrize("ema", [1.0, -0.5])
def test_a_decay_out_of_range_is_refused(bench, ema):
    with pytest.raises(InvalidInputError, match="ema must be at least 0 and below 1, got"):
        bench.train(ema=ema)

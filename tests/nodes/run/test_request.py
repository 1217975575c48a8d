"""The trainer's request: what is shown, and what a plan changes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

ASKED = {"steps": 3, "learning_rate": 1e-3, "seed": 1, "rank": 4}


@pytest.fixture
def request_of(core):
    return lambda **changes: core("hosts.runs.request").RunRequest(**{**ASKED, **changes})


@pytest.fixture
def plan(core):
    def make(**changes):
        config = core("training.config").TrainingConfig(steps=1, **changes)
        return core("accounting.plan").MemorySettings(config=config, patch_min=32, quantize_kept="int8")

    return make


def residuals(patch_min=32, storage="disk"):
    return SimpleNamespace(schedule=SimpleNamespace(patches=SimpleNamespace(patch_min=patch_min)), storage=storage)


def test_every_input_of_the_node_is_shown(nodes, request_of):
    shown = request_of().shown()
    inputs = [entry.id for entry in nodes.TrainLora.GET_SCHEMA().inputs if entry.id not in ("model", "residuals")]
    assert sorted(shown) == sorted(inputs)
    assert (shown["alpha"], shown["activation_budget"], shown["samples"]) == (4, "0 GiB", "none")


def test_a_plan_rules_what_it_plans_and_nothing_else(request_of, plan):
    asked = request_of(batch_size=4, accumulation=3, quantize_kept="fp8", memory_settings=None)
    planned = dataclasses.replace(asked, memory_settings=plan(batch_size=1, accumulation=4, checkpointing=False))
    found = planned.planned_for(residuals())
    assert (found.batch_size, found.accumulation, found.checkpointing, found.quantize_kept) == (1, 12, False, "int8")
    ruled = ("batch_size", "accumulation", "checkpointing", "activation_budget", "quantize_kept", "memory_settings")
    for field in dataclasses.fields(asked):
        if field.name not in ruled:
            assert getattr(found, field.name) == getattr(asked, field.name)
    assert asked.planned_for(residuals(patch_min=64)) is asked


@pytest.mark.parametrize("budget", [0.0, 1.0, 0.1 * 2**30, 3 * 2**29, 12345678901.0])
def test_a_planned_budget_arrives_to_the_byte(request_of, plan, budget):
    found = request_of(memory_settings=plan(activation_budget=budget)).planned_for(residuals())
    assert found.config.activation_budget == budget


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kept_weights": "elsewhere"}, "kept_weights must be one of resident, streamed, got 'elsewhere'"),
        ({"file_format": "onnx"}, "file_format must be one of diffusers, peft, kohya, got 'onnx'"),
        ({"samples": 3}, "samples must come from Sample While Training, got a int"),
        ({"memory_settings": "8 GB"}, "memory_settings must come from Memory Plan's output `settings`, got a str"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_when_it_is_made(request_of, changes, match):
    with pytest.raises(ValueError, match=match):
        request_of(**changes)

"""Counts on a model without weights are those of the same model with weights, run for real."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from blockskip_pack.blockskip_core.lora import LoraSettings
from blockskip_pack.blockskip_core.memory_counts import (
    adapters_on,
    count_pass,
    count_precompute,
    count_training,
    stand_in_residual,
)
from blockskip_pack.blockskip_core.training import TrainingConfig

from .hosted_runs import LATENT_SHAPE, chosen, hosted
from .tiny_flux import assert_same_weights, tiny_flux, weights

# Streams are float32: there the kernels of the CPU keep the same statistics of norms as those of a GPU and of `meta`.
STORED = ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "cast_to": torch.float32})


@pytest.fixture(autouse=True)
def _torch_attention(comfyui, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that the counts are made with, whatever the host would choose on this machine."""
    from blockskip_pack.blockskip_core.hosts import hosted_dit

    monkeypatch.setattr(hosted_dit, "_WITH_BACKWARD", ("attention_pytorch",))


def twins(**options):
    from blockskip_pack.blockskip_core.hosts.weightless_dit import WeightlessDit

    real = hosted(tiny_flux(**options))
    return real, WeightlessDit.of(real)


def count(dit, spans, *, folded=False, **settings):
    adapters = adapters_on(dit, spans, LoraSettings(rank=4), lambda name: dit.adapter.is_lora_target(name, "all linear"))
    config = TrainingConfig(steps=1, **settings)
    residual = None if folded else stand_in_residual(dit, LATENT_SHAPE, spans)
    return count_training(dit, LATENT_SHAPE, spans, adapters, config, residual)


def without_weights(counted):
    return dataclasses.replace(counted.with_weights(0), host=0)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("front", "back"), [(0, 0), (2, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_training_step_is_counted_as_it_is(stored, front, back, checkpointing):
    real, weightless = twins(**stored)
    counted = count(weightless, chosen(front, back), checkpointing=checkpointing)
    assert without_weights(counted) == without_weights(count(real, chosen(front, back), checkpointing=checkpointing))


def test_folded_batches_and_accumulation_are_counted_as_they_are():
    real, weightless = twins(guidance=False)
    settings = {"folded": True, "batch_size": 3, "accumulation": 2, "checkpointing": True}
    assert without_weights(count(weightless, chosen(2, 1), **settings)) == without_weights(
        count(real, chosen(2, 1), **settings)
    )

"""Counts of whole phases: they are equal with and without weights, and sums equal their parts."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.phase_counts import (
    adapters_on,
    count_pass,
    count_precompute,
    count_training,
    residual_of_zeros,
    token_shapes,
)
from blockskip_pack.blockskip_core.accounting.weightless import weightless_copy
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.blocks.linear_response import LinearResponse
from blockskip_pack.blockskip_core.model import linear_names
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.training.config import TrainingConfig

from ..plain_dit import LATENT_SHAPE, TEXT_LENGTHS, WIDTH, PlainDit, latents, schedule, selection

TOKENS = LATENT_SHAPE[1] * LATENT_SHAPE[2]
LORA = LoraSettings(rank=2)


class Weightless(PlainDit):
    """The plain model without weights; they are created for the duration of a run, like a host's loading."""

    def __init__(self, **options):
        super().__init__(**options)
        self.model = weightless_copy(self.model)
        self.captions = [text.to("meta") for text in self.captions]

    @contextmanager
    def running(self, replacements, **placement):
        with super().running(replacements) as denoise:
            loaded = [torch.empty_like(tensor) for tensor in self.net.parameters()]
            yield denoise
            loaded.clear()


def layers(dit, spans):
    return linear_names(dit, spans, lambda name: not name.endswith("gate"))


def counted(dit, spans, *, folded=False, response=None, **settings):
    residual = None if folded else residual_of_zeros(token_shapes(dit, LATENT_SHAPE), spans)
    adapters = adapters_on(dit, layers(dit, spans), LORA)
    config = TrainingConfig(steps=1, **settings)
    return count_training(dit, LATENT_SHAPE, spans, adapters, config, residual, response=response)


def comparable(count, counters=0):
    """A count without weights, host memory, and the step counters that a fused optimiser keeps for each tensor."""
    without = dataclasses.replace(count.with_weights(0), host=0)
    return dataclasses.replace(without, peak=without.peak - 4 * counters, between=without.between - 4 * counters)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("front", "back"), [(0, 0), (1, 1), (3, 1), (0, 2)])
def test_a_step_without_weights_counts_as_one_with_them(front, back, checkpointing, folded):
    settings = {"checkpointing": checkpointing, "folded": folded, "batch_size": 2, "accumulation": 2}
    weightless, real = Weightless(dtype=torch.float32), PlainDit(dtype=torch.float32)
    spans = selection(front, back)
    tensors = len(adapters_on(real, layers(real, spans), LORA).parameters())
    assert comparable(counted(weightless, spans, **settings)) == comparable(counted(real, spans, **settings), tensors)


def test_a_moving_average_takes_as_much_as_the_lora():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    lora = sum(tensor.nbytes for tensor in adapters_on(dit, layers(dit, spans), LORA).parameters())
    plain, averaged = counted(dit, spans), counted(dit, spans, ema=0.9)
    assert (averaged.peak - plain.peak, averaged.between - plain.between) == (lora, lora)
    assert averaged.operations == plain.operations


def test_adafactor_is_counted_and_keeps_less_than_adamw_and_prodigy_twice_as_much():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    plain = counted(dit, spans).between
    assert counted(dit, spans, optimizer="Adafactor").between < plain
    pytest.importorskip("prodigyopt")
    lora = sum(tensor.nbytes for tensor in adapters_on(dit, layers(dit, spans), LORA).parameters())
    prodigy = counted(dit, spans, optimizer="Prodigy (prodigyopt)", learning_rate=1.0).between
    assert prodigy - plain == 2 * lora  # at most: B's start is zero, and then the package does not store it


def test_operations_grow_with_accumulation_and_activations_with_the_batch():
    dit, spans = Weightless(), selection(1, 1)
    one, twice = counted(dit, spans), counted(dit, spans, accumulation=2)
    assert twice.operations == 2 * one.operations
    two = counted(dit, spans, batch_size=2)
    assert two.operations == 2 * one.operations
    assert two.peak - two.weights > one.peak - one.weights
    assert two.weights == one.weights


def test_between_steps_there_are_weights_lora_moments_and_what_is_replayed():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    count, adapters = counted(dit, spans), adapters_on(dit, layers(dit, spans), LORA)
    lora = sum(tensor.nbytes for tensor in adapters.parameters())
    replayed = 4 * WIDTH * (TOKENS + TEXT_LENGTHS[0] + TOKENS)
    assert count.between == count.weights + 3 * lora + replayed + 4  # the loss still exists
    assert count.peak > count.between + count.saved


def test_a_linear_answer_adds_its_maps():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    response = LinearResponse.zeros(3, WIDTH, 2, torch.float32)
    more = counted(dit, spans, response=response).between - counted(dit, spans).between
    assert more == 3 * (2 * 2 + 1) * WIDTH * 4 + 8  # and the band of the row


def test_precomputing_holds_one_block():
    dit = Weightless(dtype=torch.float32)
    count = count_precompute(dit, LATENT_SHAPE, selection(1, 1))
    blocks = [info.num_bytes for info in dit.blocks]
    others = sum(tensor.nbytes for tensor in dit.net.parameters()) - sum(blocks)
    assert count.weights == others + max(blocks)
    assert count_pass(dit, LATENT_SHAPE).weights == others + sum(blocks)
    assert count_precompute(dit, LATENT_SHAPE, selection(1, 1), draws=3).operations == count.operations


def test_operations_of_a_pass_are_those_of_its_products():
    dit, text, ops = Weightless(), TEXT_LENGTHS[0], 0
    for name, layer in dit.net.named_modules():
        if hasattr(layer, "in_features"):
            rows = TOKENS if "img" in name or name == "head" else text if "txt" in name else 1
            rows = TOKENS + text if "wide" in name or "narrow" in name else rows
            ops += 2 * rows * layer.in_features * layer.out_features
    ops += len(dit.blocks) * 2 * 2 * (TOKENS + text) ** 2 * WIDTH
    assert count_pass(dit, LATENT_SHAPE).operations == ops


def test_tokens_have_the_shapes_of_a_real_residual():
    dit = PlainDit(dtype=torch.float32)
    for front, back in ((1, 1), (3, 1), (0, 2), (2, 0)):
        spans = selection(front, back)
        real = precompute_residuals(dit, schedule(), latents(dtype=torch.float32), spans, [0]).residuals[0].tensors()
        tokens = token_shapes(dit, LATENT_SHAPE, block=max(0, front - 1))
        zeros = residual_of_zeros(tokens, spans).tensors()
        assert {name: (x.shape, x.dtype) for name, x in zeros.items()} == {
            name: (x.shape, x.dtype) for name, x in real.items()
        }

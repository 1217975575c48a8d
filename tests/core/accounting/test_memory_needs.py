"""The memory of a whole run is the sum of what its phases report."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.accounting import memory_needs as memory_needs_module
from blockskip_pack.blockskip_core.accounting.memory_needs import RunPlan, StoredWeights, memory_needs
from blockskip_pack.blockskip_core.accounting.phase_counts import adapters_on, count_pass, count_precompute
from blockskip_pack.blockskip_core.residuals.back_response import fit_bytes
from blockskip_pack.blockskip_core.training.config import TrainingConfig

from ..plain_dit import LATENT_SHAPE, TEXT_LENGTHS, WIDTH, PlainDit, latents, selection
from .test_phase_counts import LORA, TOKENS, Weightless, counted, layers


def plan(dit, spans, **changes):
    settings = {
        "latent_shape": LATENT_SHAPE, "probe_shape": LATENT_SHAPE, "selection": spans, "lora": LORA,
        "layers": layers(dit, spans),
        "config": TrainingConfig(steps=1),
    }  # fmt: skip
    return RunPlan(**{**settings, **changes})


def test_needs_are_the_counts_of_their_phases():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    needs = memory_needs(dit, plan(dit, spans, draws=9, chunk=2, stored=9))
    assert needs.selecting == count_pass(dit, LATENT_SHAPE)
    assert needs.precomputing == count_precompute(dit, LATENT_SHAPE, spans)
    assert needs.training == counted(dit, spans)
    one = 4 * WIDTH * (TOKENS + TEXT_LENGTHS[0] + TOKENS)
    assert (needs.replayed, needs.disk) == (one, 9 * one)
    assert needs.lora == sum(t.nbytes for t in adapters_on(dit, layers(dit, spans), LORA).parameters())
    assert memory_needs(dit, plan(dit, selection(0, 0))).precomputing is None


def test_needs_of_a_span_before_a_tail():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 2, tail=1)
    needs = memory_needs(dit, plan(dit, spans, draws=9, chunk=2, stored=9))
    assert needs.training == counted(dit, spans)
    one = 4 * WIDTH * 2 * (TOKENS + TEXT_LENGTHS[0])  # image and text, after the front and over the back
    assert (needs.replayed, needs.disk) == (one, 9 * one)
    weights = StoredWeights(blocks=[10**index for index in range(5)], others=0)
    assert memory_needs(dit, plan(dit, spans), weights).training.weights == 10**1 + 10**4


def test_needs_of_training_on_the_fly():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    needs = memory_needs(dit, plan(dit, spans, on_the_fly=True, linear=True))
    assert (needs.precomputing, needs.disk) == (None, 0)
    assert needs.training == counted(dit, spans, folded=True)


def test_needs_with_a_linear_answer():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    constant, linear = (memory_needs(dit, plan(dit, spans, linear=flag)) for flag in (False, True))
    maps = 4 * (2 * WIDTH + 1) * WIDTH  # for so few draws one band; its rank is at most the width
    assert linear.replayed - constant.replayed == maps
    assert linear.disk - constant.disk == maps + 8  # and the error on held-out draws


def test_stored_weights_take_the_place_of_those_of_the_tensors():
    dit, spans = Weightless(dtype=torch.float32), selection(1, 1)
    quarter = StoredWeights(blocks=[info.num_bytes // 4 for info in dit.blocks], others=100)
    plain, packed = memory_needs(dit, plan(dit, spans)), memory_needs(dit, plan(dit, spans), quarter)
    kept = sum(quarter.blocks[index] for index in spans.kept) + 100
    assert packed.training.weights == kept
    assert packed.training.peak - kept == plain.training.peak - plain.training.weights
    assert packed.training.between - kept == plain.training.between - plain.training.weights
    assert packed.precomputing.weights == max(quarter.blocks) + 100
    assert packed.selecting.weights == sum(quarter.blocks) + 100


@pytest.mark.parametrize(("front", "back", "tail"), [(1, 1, 0), (2, 0, 0), (0, 2, 0), (1, 2, 1)])
@pytest.mark.parametrize("linear", [False, True])
def test_host_memory_of_a_chunk_is_at_most_what_is_said(front, back, tail, linear):
    dit, spans, draws = Weightless(dtype=torch.float32), selection(front, back, tail=tail), 12
    needs = memory_needs(dit, plan(dit, spans, linear=linear, draws=draws, chunk=draws))
    host = count_precompute(dit, LATENT_SHAPE, spans, draws=draws, keep_entering=linear).host
    host += draws * 4 * latents(1)[0].numel()
    host += fit_bytes(WIDTH) if linear and back else 0
    # In float32 sums need no copy in the streams' dtype, which is counted, and with a tail there are more of them.
    assert (0.75 if tail else 0.8) * needs.host <= host <= needs.host


def test_counting_leaves_the_model_alone():
    dit = PlainDit(dtype=torch.float32)
    before, net = dit.weights_hash(), copy.copy(dit.modules_by_name())
    memory_needs(dit, plan(dit, selection(1, 1)))
    assert (dit.weights_hash(), dit.modules_by_name()) == (before, net)


def test_what_was_counted_for_another_run_of_the_model_is_not_counted_again(monkeypatch):
    dit, once, made = Weightless(dtype=torch.float32), memory_needs_module.CountedOnce(), []
    for name in ("count_pass", "count_precompute", "count_training"):
        count = getattr(memory_needs_module, name)
        monkeypatch.setattr(
            memory_needs_module, name, lambda *a, _count=count, _name=name, **k: made.append(_name) or _count(*a, **k)
        )

    def remade(spans=None, weights=None, **changes):
        made.clear()
        asked = plan(dit, spans or selection(1, 1), **changes)
        remembered = memory_needs(dit, asked, weights, once)
        counts = sorted(made)
        assert remembered == memory_needs(dit, asked, weights)
        return counts

    assert remade() == ["count_pass", "count_precompute", "count_training"]
    assert remade(draws=9, chunk=2, stored=9, residual_format="fp8") == []
    assert remade(weights=StoredWeights(blocks=[1] * len(dit.blocks), others=1)) == []
    assert remade(config=TrainingConfig(steps=1, checkpointing=False)) == ["count_training"]
    assert remade(lora=replace(LORA, rank=LORA.rank + 1)) == ["count_training"]
    assert remade(layers=dict(list(layers(dit, selection(1, 1)).items())[1:])) == ["count_training"]
    assert remade(on_the_fly=True) == ["count_training"]
    assert remade(linear=True) == ["count_precompute", "count_training"]
    assert remade(linear=True, draws=200) == ["count_training"]  # a response of more bands
    assert remade(selection(2, 0)) == ["count_precompute", "count_training"]
    assert remade(latent_shape=(*LATENT_SHAPE[:2], LATENT_SHAPE[2] + 2)) == ["count_precompute", "count_training"]
    assert remade(probe_shape=(*LATENT_SHAPE[:2], LATENT_SHAPE[2] + 2)) == ["count_pass"]
    assert remade(caption=1) == ["count_pass", "count_precompute", "count_training"]

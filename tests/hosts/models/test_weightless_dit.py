"""Counts on a model without weights equal those of the same model with weights, really run."""

from __future__ import annotations

import dataclasses

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
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.training.config import TrainingConfig

from ..hosted_runs import LATENT_SHAPE, chosen, hosted
from ..tiny_flux import assert_same_weights, tiny_flux, weights

# Streams are float32, because CPU kernels then keep the same norm statistics as those of a GPU and of `meta`.
STORED = ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "cast_to": torch.float32})


@pytest.fixture(autouse=True)
def _torch_attention(comfyui, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that the counts use, whatever ComfyUI would choose on this machine."""
    from blockskip_pack.blockskip_core.hosts.models import hosted_dit

    monkeypatch.setattr(hosted_dit, "_WITH_BACKWARD", ("attention_pytorch",))


def twins(**options):
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    real = hosted(tiny_flux(**options))
    return real, WeightlessDit.of(real)


def count(dit, spans, *, folded=False, **settings):
    adapters = adapters_on(dit, dit.lora_layers(spans, "all linear"), LoraSettings(rank=4))
    config = TrainingConfig(steps=1, **settings)
    residual = None if folded else residual_of_zeros(token_shapes(dit, LATENT_SHAPE, block=spans.front), spans)
    return count_training(dit, LATENT_SHAPE, spans, adapters, config, residual)


def without_weights(counted, counters=0):
    """A count without weights, host memory, and the step counters that a fused optimiser keeps for each tensor."""
    bare = dataclasses.replace(counted.with_weights(0), host=0)
    return dataclasses.replace(
        bare, peak=bare.peak - 4 * counters, between=bare.between and bare.between - 4 * counters
    )


def lora_tensors(dit, spans):
    """The number of tensors in the LoRA of :func:`count`."""
    return len(adapters_on(dit, dit.lora_layers(spans, "all linear"), LoraSettings(rank=4)).parameters())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("front", "back", "checkpointing"), [(0, 0, True), (2, 1, True), (2, 1, False), (0, 3, False), (3, 0, True)]
)
def test_a_training_step_is_counted_as_it_is(stored, front, back, checkpointing):
    real, weightless = twins(**stored)
    counted = count(weightless, chosen(front, back), checkpointing=checkpointing)
    expected = count(real, chosen(front, back), checkpointing=checkpointing)
    assert without_weights(counted) == without_weights(expected, lora_tensors(real, chosen(front, back)))


def test_folded_batches_and_accumulation_are_counted_as_they_are():
    real, weightless = twins(guidance=False)
    settings = {"folded": True, "batch_size": 3, "accumulation": 2, "checkpointing": True}
    assert without_weights(count(weightless, chosen(2, 1), **settings)) == without_weights(
        count(real, chosen(2, 1), **settings), lora_tensors(real, chosen(2, 1))
    )


def test_a_pass_and_the_precomputing_are_counted_as_they_are():
    real, weightless = twins(guidance=False)
    for spans in (chosen(2, 1), chosen(0, 3)):
        for keep_entering in (False, True):
            options = {"draws": 1, "keep_entering": keep_entering}
            counted = count_precompute(weightless, LATENT_SHAPE, spans, **options)
            assert counted.operations == count_precompute(real, LATENT_SHAPE, spans, **options).operations
    assert without_weights(count_pass(weightless, LATENT_SHAPE)) == without_weights(count_pass(real, LATENT_SHAPE))


def test_loaded_weights_are_stem_head_and_what_is_kept():
    real, weightless = twins(dtype=torch.bfloat16)
    model = real.patcher.model.diffusion_model
    stem_and_head = sum(p.nbytes for name, p in model.named_parameters() if "blocks" not in name)
    whole = sum(p.nbytes for p in model.parameters())
    assert count_pass(weightless, LATENT_SHAPE).weights == whole
    spans = chosen(2, 1)
    assert count(weightless, spans).weights == stem_and_head + sum(real.block_bytes[index] for index in spans.kept)
    assert count(weightless, spans, folded=True).weights == whole
    assert count_precompute(weightless, LATENT_SHAPE, spans).weights == stem_and_head + max(real.block_bytes)


def test_token_shapes_are_those_of_real_residuals():
    from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

    from ..hosted_runs import PLAN, clean_latents

    real, weightless = twins(dtype=torch.bfloat16)
    for front, back in ((1, 2), (3, 1), (0, 2), (4, 0)):
        spans = chosen(front, back)
        expected = precompute_residuals(real, PLAN, clean_latents(), spans, [0]).residuals[0].tensors()
        tokens = token_shapes(weightless, LATENT_SHAPE, block=max(0, front - 1))
        made = residual_of_zeros(tokens, spans).tensors()
        assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
            name: (x.shape, x.dtype) for name, x in expected.items()
        }


def test_the_model_is_left_as_it_was_and_nothing_becomes_real():
    import comfy.model_management

    patcher = tiny_flux(guidance=False)
    before, modules = weights(patcher), dict(patcher.model.named_modules())
    real = hosted(patcher)
    weightless = type(twins()[1]).of(real)
    tree = dict(weightless.model.named_modules())
    count(weightless, chosen(2, 1))
    count_precompute(weightless, LATENT_SHAPE, chosen(2, 1))
    assert_same_weights(patcher, before)
    assert dict(patcher.model.named_modules()) == modules
    assert dict(weightless.model.named_modules()) == tree
    assert all(tensor.is_meta for tensor in weightless.model.state_dict().values())
    assert not comfy.model_management.in_training
    with pytest.raises(RuntimeError, match="stop"), weightless.running({}):
        raise RuntimeError("stop")
    assert not comfy.model_management.in_training


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_the_host_is_asked_to_keep_free_is_enough_at_full_size(checkpointing):
    """FLUX.1-dev at 256 px with 512 text tokens, the first 19 and the last 10 blocks skipped."""
    from blockskip_pack.blockskip_core.accounting.step_estimate import estimated_step_bytes
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
    from blockskip_pack.blockskip_core.selection.selection import BlockSelection

    shape, text = (16, 32, 32), 512
    caption = [[torch.zeros(1, text, 4096), {"pooled_output": torch.zeros(1, 768), "guidance": 3.5}]]
    dit = WeightlessDit.published("FLUX.1-dev", caption, shape)
    spans = BlockSelection(front=19, back=10, num_blocks=57, family="flux")
    adapters = adapters_on(dit, dit.lora_layers(spans, "attention and mlp"), LoraSettings(rank=16))
    residual = residual_of_zeros(token_shapes(dit, shape, block=18), spans)
    counted = count_training(
        dit, shape, spans, adapters, TrainingConfig(steps=1, checkpointing=checkpointing), residual
    )
    estimated = estimated_step_bytes(
        num_kept=28, tokens=256 + text, width=3072, itemsize=2, batch_size=1, checkpointing=checkpointing,
        lora_numbers=adapters.num_parameters,
    )  # fmt: skip
    assert 1.0 <= estimated / (counted.peak - counted.weights) < 1.3

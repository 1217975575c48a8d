"""A model that does not match its residuals, or cannot learn, is detected."""

import re

import pytest
import torch
from blockskip_pack.blockskip_core.errors import TrainingError

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection, train
from .test_loop import trained


@pytest.mark.parametrize(
    ("spans", "stream"), [((1, 2), "back"), ((1, 2), "front"), ((0, 1), "back"), ((2, 0), "front")]
)
def test_residuals_of_another_model_are_noticed_before_the_first_step(spans, stream):
    dit, chosen, plan, clean = PlainDit(), selection(*spans), schedule(), latents()
    source = MemorySource(dit, chosen, plan, clean)
    residual = source.computed.residuals[0]
    tensor = residual.back if stream == "back" else residual.front.img
    tensor.mul_(1.01)
    adapters = lora_for(dit, chosen)
    before = [p.detach().clone() for p in adapters.parameters()]
    with pytest.raises(TrainingError, match="differs from the full model by .*use the same model for both"):
        train(dit, chosen, source, adapters, plan=plan, clean=clean)
    assert all(torch.equal(a, b) for a, b in zip(adapters.parameters(), before, strict=True))


def test_a_model_that_has_changed_since_is_noticed():
    dit, chosen, plan, clean = PlainDit(), selection(1, 2), schedule(), latents()
    source = MemorySource(dit, chosen, plan, clean)
    with torch.no_grad():
        dit.module("single_blocks.0").narrow.weight.mul_(1.05)
    with pytest.raises(TrainingError, match="differs from the full model"):
        train(dit, chosen, source, lora_for(dit, chosen), plan=plan, clean=clean)


def test_the_self_check_compares_before_the_lora_acts():
    *_, result, _ = trained(1, 2, zero=False)
    assert result.self_check < 1e-12


def test_a_kept_block_without_gradient_is_noticed():
    dit, chosen = PlainDit(), selection(1, 2)
    adapters = lora_for(dit, chosen)
    for name in adapters.names:
        if name.startswith("double_blocks.1."):
            adapters.up(name).register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=re.escape("Block double_blocks.1 got no gradient in the first step")):
        train(dit, chosen, MemorySource(dit, chosen, schedule(), latents()), adapters)

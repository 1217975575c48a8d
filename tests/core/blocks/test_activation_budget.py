"""Blocks that keep their activations within a budget: equal gradients, and no more bytes than allowed."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.activation_budget import ActivationBudget
from blockskip_pack.blockskip_core.blocks.saved_bytes import SavedBytes
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.blocks.stand_ins import TrainedBlock
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.training.config import TrainingConfig

from ..plain_dit import MemorySource, PlainDit, latents, lora_for, schedule, selection, train

FRONT, BACK = 1, 1  # of five blocks: three are trained


def run(budget=0, *, steps=3, checkpointing=True, **settings):
    """Train three blocks; (losses, LoRA tensors, bytes kept)."""
    dit, plan, chosen = PlainDit(), schedule(captions=(0, 1, 0, 1)), selection(FRONT, BACK)
    adapters = lora_for(dit, chosen, zero=False)
    source = MemorySource(dit, chosen, plan, latents())
    result, _ = train(dit, chosen, source, adapters, plan=plan, clean=latents(), steps=steps,
                      activation_budget=budget, checkpointing=checkpointing, **settings)  # fmt: skip
    return result.losses, adapters.state_dict(), result.saved_bytes


def counted_blocks():
    """The trained blocks after a counting forward pass, and the bytes that each would keep."""
    dit, chosen = PlainDit(), selection(FRONT, BACK)
    model = SkippingModel(dit, chosen, checkpointed=True, folded=False)
    source = MemorySource(dit, chosen, schedule(), latents())
    (opening,) = source.stretches(MicroBatches(steps=1))
    adapters = lora_for(dit, chosen)
    budget = ActivationBudget(model.trained_blocks, 1)
    with opening as residuals, dit.running(model.modules) as denoise:
        with adapters.attached(model.linears(), dit.weight_for_backward), torch.enable_grad():
            model.replay(residuals.residual, [0], None)
            with budget.forward(11):
                denoise(latents()[:1], torch.tensor([0.5], dtype=torch.float64), [0])
    return model.trained_blocks


class KeepsItsOutput(torch.nn.Module):
    """A block of two operations that save their own output for backward."""

    def __init__(self):
        super().__init__()
        self.made = []

    def forward(self, x):
        for operation in (torch.tanh, lambda y: y.softmax(-1)):
            x = operation(x)
            self.made.append(weakref.ref(x.untyped_storage()))
        return x


def test_what_was_counted_is_freed_at_once():
    block = KeepsItsOutput()
    trained = TrainedBlock(block, checkpointed=True)
    trained.counting = True
    out = trained(torch.ones(2, 3, requires_grad=True))
    assert trained.activation_bytes > 0
    assert [made() is None for made in block.made[:2]] == [True, True], "the pass that only counted"
    out.sum().backward()


def test_a_step_that_fails_between_forward_and_backward_leaves_nothing_behind():
    block = KeepsItsOutput()
    with SavedBytes().counting():
        block(torch.ones(2, 3, requires_grad=True))
    assert [made() is None for made in block.made] == [True, True]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 10.0])
def test_losses_and_weights_do_not_depend_on_the_budget_to_the_last_bit(share):
    whole = sum(block.activation_bytes for block in counted_blocks())
    losses, state, _ = run(int(share * whole))
    expected_losses, expected, _ = run()
    assert losses == expected_losses
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_budget_for_all_keeps_what_is_kept_without_checkpointing():
    kept, recomputed, everything = run(checkpointing=False)[2], run()[2], run(10**9)[2]
    assert recomputed < kept
    assert everything == kept


def test_bytes_kept_grow_by_no_more_than_the_budget():
    sizes = [block.activation_bytes for block in counted_blocks()]
    none, one = run()[2], run(sizes[-1])[2]
    assert none < one <= none + sizes[-1]


@pytest.mark.parametrize(
    ("budget", "recomputed"),
    [(0, [True] * 3), (29, [True] * 3), (30, [True, True, False]), (69, [True, True, False]),
     (70, [True, False, False]), (10**9, [False] * 3)],
)  # fmt: skip
def test_the_last_blocks_keep_theirs_as_far_as_the_budget_goes(budget, recomputed):
    blocks = [SimpleNamespace(checkpointed=True, counting=False, activation_bytes=size) for size in (10, 40, 30)]
    with ActivationBudget(blocks, budget).forward(1):
        assert all(block.checkpointed for block in blocks)
        assert all(block.counting for block in blocks) == (budget > 0)
    assert [block.checkpointed for block in blocks] == recomputed
    assert not any(block.counting for block in blocks)


def test_a_larger_batch_is_counted_anew_with_all_recomputed():
    blocks = [SimpleNamespace(checkpointed=True, counting=False, activation_bytes=10) for _ in range(2)]
    budget = ActivationBudget(blocks, 15)
    for tokens, counts in ((8, True), (8, False), (5, False), (9, True), (9, False)):
        with budget.forward(tokens):
            assert [block.counting for block in blocks] == [counts] * 2
            assert [block.checkpointed for block in blocks] == ([True] * 2 if counts else [True, False])


def test_counting_ends_when_the_forward_fails():
    blocks = [SimpleNamespace(checkpointed=True, counting=False, activation_bytes=0)]
    budget = ActivationBudget(blocks, 15)
    with pytest.raises(RuntimeError), budget.forward(1):
        raise RuntimeError
    assert not blocks[0].counting
    assert blocks[0].checkpointed, "what was not counted is recomputed"


def test_without_a_budget_nothing_is_counted():
    block = TrainedBlock(torch.nn.Identity(), checkpointed=False)
    with ActivationBudget([block], 0).forward(1):
        assert not block.counting
    assert not block.checkpointed


def test_a_negative_budget_is_refused():
    with pytest.raises(InvalidInputError, match="activation_budget must not be negative"):
        TrainingConfig(steps=1, activation_budget=-1)

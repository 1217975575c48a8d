"""Which stand-in replaces which block, and what it holds."""

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from torch import nn

from ..plain_dit import PlainDit, selection
from ..training.test_loop import SPANS


def storages(module: nn.Module) -> set[int]:
    """Return the memory of every tensor that is reachable from a module, registered or not."""
    found, seen, queue = set(), set(), [module]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.add(item.untyped_storage().data_ptr())
        elif isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(item)
        elif isinstance(item, nn.Module) or hasattr(item, "__dataclass_fields__"):
            queue.append(vars(item))
    return found


@pytest.mark.parametrize(("front", "back"), SPANS)
def test_no_weight_of_a_skipped_block_is_held_while_training(front, back):
    dit, chosen = PlainDit(), selection(front, back)
    model = SkippingModel(dit, chosen, checkpointed=True, folded=False)
    held = set().union(*(storages(module) for module in model.modules.values()))
    for index, block in enumerate(dit.blocks):
        weights = {p.untyped_storage().data_ptr() for p in dit.module(block.name).parameters()}
        if index in chosen.kept:
            assert weights <= held
        else:
            assert held.isdisjoint(weights)


def test_stand_ins_share_the_weights_under_the_blocks_own_names():
    dit = PlainDit()
    for folded in (False, True):
        model = SkippingModel(dit, selection(1, 2), checkpointed=True, folded=folded)
        for name, module in model.modules.items():
            original = dict(dit.module(name).named_parameters())
            shared = dict(module.named_parameters())
            assert shared.keys() in (original.keys(), set())
            for key, parameter in shared.items():
                assert parameter.data_ptr() == original[key].data_ptr()
                assert parameter is not original[key]


def test_attributes_of_a_block_can_be_read_off_its_stand_in():
    dit = PlainDit()
    dit.module("single_blocks.0").num_heads = 17
    stand_in = SkippingModel(dit, selection(1, 2), checkpointed=True, folded=False).modules["single_blocks.0"]
    assert stand_in.num_heads == 17
    with pytest.raises(AttributeError):
        _ = stand_in.nonsense


def test_a_head_of_one_layer_runs_as_that_layer():
    """A host sets attributes on layers and reads them in their forward."""
    dit = PlainDit()
    model = SkippingModel(dit, selection(1, 1), checkpointed=True, folded=False)
    head = model.modules["head"]
    assert type(head) is nn.Linear
    assert head is not dit.module("head")
    assert head.weight.data_ptr() == dit.module("head").weight.data_ptr()
    assert model.linears()["head"] is head

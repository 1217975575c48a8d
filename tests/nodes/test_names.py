"""Users find the nodes by what they want to do, and see the names that the documents use."""

from __future__ import annotations

import pytest

TYPED = {
    "lora training": {"BlockSkip_TrainLora", "BlockSkip_PrecomputeResiduals", "BlockSkip_LoadTrainingFolder"},
    "train flux": {"BlockSkip_TrainLora"},
    "train lora": {"BlockSkip_TrainLora"},
    "character lora": {"BlockSkip_TrainLora", "BlockSkip_ApplyLora"},
    "low vram": {"BlockSkip_TrainLora", "BlockSkip_MemoryPlan", "BlockSkip_SelectBlocks"},
    "8gb": {"BlockSkip_TrainLora", "BlockSkip_MemoryPlan"},
    "12gb": {"BlockSkip_TrainLora", "BlockSkip_MemoryPlan"},
    "12 gb": {"BlockSkip_TrainLora", "BlockSkip_MemoryPlan"},
    "will it fit": {"BlockSkip_MemoryPlan"},
    "faster": {"BlockSkip_RALUSampler", "BlockSkip_TrainLora"},
    "dynamic patch trainer": {"BlockSkip_TrainLora"},
    "precompute residuals": {"BlockSkip_PrecomputeResiduals"},
    "select blocks": {"BlockSkip_SelectBlocks"},
    "memory plan": {"BlockSkip_MemoryPlan"},
    "ralu sampler": {"BlockSkip_RALUSampler"},
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_people_type_finds_the_nodes(nodes, typed):
    """In the name or in an alias, as the page's search compares them."""
    schemas = [node.GET_SCHEMA() for node in nodes.NODE_CLASSES]
    found = {
        schema.node_id
        for schema in schemas
        if any(typed in words.lower() for words in (schema.display_name, *schema.search_aliases))
    }
    assert TYPED[typed] <= found


def test_no_alias_twice(nodes):
    for node in nodes.NODE_CLASSES:
        aliases = node.GET_SCHEMA().search_aliases
        assert len(set(aliases)) == len(aliases)

"""Layers that are run without adapters, in models whose blocks write into what a layer returns."""

from __future__ import annotations

import pytest
import torch

from ...core.plain_dit import MemorySource, lora_for, selection, train
from ..edit_models import edit_model
from ..tiny_families import PLAN
from . import test_followed_references, test_references

pytestmark = pytest.mark.usefixtures("comfyui")

CASES = [*test_references.CASES, *test_followed_references.CASES]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)), scope="module")
def tiny(request):
    return edit_model(*request.param)


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


def adapters_like(dit, spans, given, like):
    """Adapters of the layers ``given``, equal to ``like`` where that has them, and without effect elsewhere."""
    made = lora_for(dit, spans, wanted=set(given).__contains__, dtype=torch.float32, size=0.05)
    known = {} if like is None else named(like)
    with torch.no_grad():
        for name, parameter in named(made).items():
            if name in known:
                parameter.copy_(known[name])
            elif like is not None and name.endswith(".B"):
                parameter.zero_()
    return made


def named(adapters):
    keys = [f"{name}.{part}" for name in adapters.names for part in "AB"]
    return dict(zip(keys, adapters.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("without", ["frozen blocks", "attention"])
def test_they_give_the_gradients_that_they_give_with_adapters_of_no_effect(tiny, patcher, without, checkpointing):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    count = len(dit.blocks)
    everything = selection(1, 0, count)
    if without == "frozen blocks":
        few = selection(1, count - 2, count).with_exact_back()
        layers = dit.lora_layers(few, "attention and mlp")
    else:
        few = everything
        layers = dit.lora_layers(few, "mlp")
    some = adapters_like(dit, few, layers, None)
    every = adapters_like(dit, everything, dit.lora_layers(everything, "all linear"), some)
    assert len(every.names) > len(some.names)
    got = []
    for spans, adapters in ((few, some), (everything, every)):
        source = MemorySource(dit, spans, PLAN, clean, [0, 1])
        result, gradients = train(
            dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, checkpointing=checkpointing
        )
        got.append((result.losses, gradients))
    (losses, gradients), (expected_losses, expected) = got
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert gradients
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm().clamp_min(1e-12), name

"""What the benchmark of words learns besides words: zeros change nothing, and each row of a batch is its own model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ..hosts.tiny_flux import tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")
CONTEXT, POOLED, ROWS = (1, 5, 16), (1, 16), 3


@pytest.fixture
def stronger(bench):
    return bench("words_stronger")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def double_layers():
    torch.manual_seed(0)
    return {"wide": nn.Linear(6, 9).double(), "narrow": nn.Linear(9, 4).double()}


def called(layers, given):
    return layers["narrow"](layers["wide"](given).tanh())


def test_cores_of_a_batch_are_those_of_single_rows_and_of_changed_weights(stronger) -> None:
    layers = double_layers()
    way = stronger.Cores(layers, 2, 0.1)
    rows, given = normal(ROWS, way.layout.numbers).double(), normal(ROWS, 5, 6, seed=1).double()
    plain = called(layers, given)
    with way.applied(None, rows):
        batch = called(layers, given)
    for number in range(ROWS):
        with way.applied(None, rows[number : number + 1]):
            torch.testing.assert_close(called(layers, given[number : number + 1])[0], batch[number])
        changed = double_layers()
        for name, core in way.layout.split(rows[number]).items():
            left, _, right = torch.linalg.svd(layers[name].weight, full_matrices=False)
            changed[name].weight.data += left[:, :2] @ core @ right[:2]
        torch.testing.assert_close(called(changed, given[number]), batch[number])
    assert not torch.allclose(plain, batch)
    assert torch.equal(called(layers, given), plain)


def test_hooks_are_removed_after_an_error(stronger) -> None:
    layers = double_layers()
    way = stronger.Cores(layers, 2, 0.1)
    with pytest.raises(KeyError), way.applied(None, torch.ones(1, way.layout.numbers)):
        raise KeyError
    assert not any(layer._forward_hooks for layer in layers.values())


@pytest.fixture
def ways(stronger):
    model = tiny_flux()
    context, pooled = normal(*CONTEXT), normal(*POOLED, seed=1)
    return (
        stronger,
        model,
        context,
        pooled,
        {name: make(model, context, pooled) for name, make in stronger.WAYS.items()},
    )


def losses_of(stronger, model, context, pooled, way, rows):
    from blockskip_pack.blockskip_core.zoodip.examples import Example

    losses = stronger.WayLosses(model, [(context, pooled)], normal(1, 4, 8, 8), way)
    with torch.no_grad(), losses.loaded(len(rows)):
        return losses(rows, Example(0, False, 0.5, 7))


def test_zeros_are_the_plain_model_and_rows_are_separate(ways) -> None:
    stronger, model, context, pooled, made = ways
    for name, way in made.items():
        rows = 0.3 * way.layout.sizes * normal(ROWS, way.layout.numbers, seed=2)
        found = losses_of(stronger, model, context, pooled, way, rows)
        single = torch.cat([losses_of(stronger, model, context, pooled, way, row[None]) for row in rows])
        torch.testing.assert_close(found, single)
        assert len(set(found.tolist())) == ROWS, name
        zeros = torch.zeros(ROWS, way.layout.numbers)
        text = context if "after" not in name else torch.cat([context, zeros[:1].view(1, -1, 16)], 1)
        plain = losses_of(stronger, model, text, pooled, stronger.Way(), zeros)
        assert torch.equal(losses_of(stronger, model, context, pooled, way, zeros), plain), name


def test_every_stronger_arm_names_a_way(bench, stronger) -> None:
    assert {arm.way for arm in bench("words_arms").ARMS if arm.way} == set(stronger.WAYS)

"""Autograd never saves memory that ComfyUI reuses.

A layer whose weights are not on the card gets them in a buffer or in pages during its forward pass, and the next layers
get theirs in the same memory. So everything that backward reads later must be elsewhere; no error would be raised if it
were not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ..device import devtools
from ..hosts.tiny_families import FAMILIES
from .modes import MODES
from .runs import Runs

pytestmark = pytest.mark.emulated  # the addresses on a real card cannot be queried
LENDING = ("streamed", "few_pages")


class Saved:
    """Checks every tensor that autograd saves.

    Attributes:
        count: Number of tensors on the card.
        lent: Shapes of those in memory that ComfyUI reuses.
    """

    def __init__(self) -> None:
        self.count = 0
        self.lent: list[tuple[int, ...]] = []

    def look(self, tensor: Tensor) -> Tensor:
        """Check one tensor."""
        if tensor.is_cuda:
            self.count += 1
            if devtools("card.comfyui").is_lent(tensor.untyped_storage().data_ptr()):
                self.lent.append(tuple(tensor.shape))
        return tensor

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Check everything that is saved in this context."""
        with torch.autograd.graph.saved_tensors_hooks(self.look, lambda tensor: tensor):
            yield


def in_turn() -> Iterator[Any]:
    """Every family in one of the modes, and the first in both."""
    pairs = [(family, LENDING[place % 2]) for place, family in enumerate(FAMILIES)]
    for family, mode in (*pairs, (FAMILIES[0], LENDING[1])):
        yield pytest.param(family, mode, id=f"{family.name}-{mode}")


@pytest.mark.parametrize(("family", "mode"), list(in_turn()))
def test_it_is_memory_of_its_own(card, runs: Runs, family, mode):
    """Without checkpointing, which has its own hooks; the trainer's hooks count saved bytes in the first two steps."""
    saved, model = Saved(), family.build()
    with MODES[mode](card, model) as treated, saved.looking():
        runs.train(family, treated, storage="chunked", draws=3, checkpointing=False, steps=3)
    assert saved.count > 20
    assert not saved.lent


def test_a_tensor_in_a_buffer_of_the_host_is_seen(card):
    """The test above can fail: a norm's forward saves its weight in memory that ComfyUI reuses."""
    import comfy.model_management as management
    import comfy.ops

    norm, saved = comfy.ops.manual_cast.LayerNorm(8), Saved()
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    tokens = torch.ones(2, 8, device=management.get_torch_device(), requires_grad=True)
    with saved.looking():
        norm(tokens)
    assert set(saved.lent) == {(8,)}  # weight and bias

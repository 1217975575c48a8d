"""Training on a card is training on the CPU, however the host treats the MODEL."""

from __future__ import annotations

import time

import pytest
import torch

from ..hosts.families import FAMILIES
from .modes import MODES
from .runs import on_cpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_t(card, runs, folders, family, mode):
    t = time.time()
    model = family.build()
    t1 = time.time()
    expected = runs.train(family, on_cpu(model))
    t2 = time.time()
    import shutil

    shutil.rmtree(folders.output / "blockskip")
    with MODES[mode](card, model) as treated:
        outcome = runs.train(family, treated)
        t3 = time.time()
        print(
            "BUILD",
            t1 - t,
            "CPU",
            t2 - t1,
            "CARD",
            t3 - t2,
            "diff",
            outcome.differences(expected),
            outcome.losses == expected.losses,
            outcome.is_bit_equal(expected),
            card.memory.settled(),
        )
    assert outcome.is_bit_equal(expected)

"""A card in its state between two prompts, and runs of the pack's nodes on it.

These tests run in a separate process, ``python dev.py test --card``: see ``tests/device.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from ..conftest import DEVICE
from ..core.conftest import _one_thread  # noqa: F401  a fixture is used by being there
from ..device import devtools
from ..nodes.conftest import core, folders, nodes, pictures, run_node, tiny  # noqa: F401
from .runs import Runs


@pytest.fixture(scope="session")
def _modules_are_for_good(nodes: Any) -> None:  # noqa: F811
    """Exclude everything imported so far from later garbage collections, of which each test does several."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def card(_modules_are_for_good: None, pytestconfig: pytest.Config) -> Iterator[Any]:
    """The card, empty before and after."""
    tools, card = devtools("card.comfyui"), pytestconfig.stash[DEVICE].card
    tools.forget_models()
    card.memory.reset_peak()
    yield card
    tools.forget_models()


@pytest.fixture
def runs(card: Any, nodes: Any, run_node: Any, pictures: Any, folders: Any) -> Runs:  # noqa: F811
    """The pack's nodes one after another, on any family."""
    return Runs(nodes, run_node, pictures, folders.output)

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


@pytest.fixture
def card(nodes: Any, pytestconfig: pytest.Config) -> Iterator[Any]:  # noqa: F811
    """The card, empty before and after."""
    tools, card = devtools("card.comfyui"), pytestconfig.stash[DEVICE].card
    tools.forget_models()
    gc.freeze()  # a test collects garbage several times: exclude everything that is older than the test
    card.memory.reset_peak()
    yield card
    tools.forget_models()


@pytest.fixture
def runs(card: Any, nodes: Any, run_node: Any, pictures: Any, folders: Any) -> Runs:  # noqa: F811
    """The pack's nodes one after another, on any family."""
    return Runs(nodes, run_node, pictures, folders.output)

"""Fixtures for tests of killed processes and full disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..core.conftest import _one_thread  # noqa: F401  a fixture is used by being there
from ..nodes.conftest import bench, core, folders, model, nodes, pictures, prompt, run_node, tiny, vae  # noqa: F401
from .fork_client import NAMESPACES, ForkServer, may_mount


@pytest.fixture(scope="session")
def fork_server(comfyui: Path) -> Iterator[ForkServer]:
    """A process with ComfyUI and the pack loaded, which runs graphs in forked copies of itself."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork: starting a separate process for each run would take seconds")
    with ForkServer(next(filter(may_mount, NAMESPACES), ())) as server:
        yield server

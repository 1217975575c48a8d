"""Hypothesis' settings, and the nodes' fixtures."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from ..core.conftest import _one_thread  # noqa: F401  a fixture is used by being there
from ..nodes.conftest import core, nodes, run_node, tiny  # noqa: F401

settings.register_profile(
    "blockskip",
    derandomize=True,  # the same examples every time
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("blockskip")

"""Makes the demo's modules importable by their plain names, as its scripts import them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the demo: ``demo("world")``."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module


@pytest.fixture
def world(demo: Callable[[str], ModuleType]) -> ModuleType:
    """The renderer."""
    return demo("world")

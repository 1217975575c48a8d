"""Makes the benchmarks' modules importable by their plain names, as the scripts import them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of the benchmarks: ``bench("quality")``."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module

"""What the models of the tests run on: ``pytest --device cpu``, ``card`` (an emulated one) or ``gpu`` (a real one).

The choice is for a whole process: an emulated card cannot be taken back, and ComfyUI looks for its device when it is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEVTOOLS = "blockskip_devtools"
KINDS = ("cpu", "card", "gpu")
CARD_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Device:
    """Where the models of this process run.

    Attributes:
        kind: One of :data:`KINDS`.
        card: The emulated card, or what answers in its place for a real one; None on a CPU.
        obstacle: Why there is no such device here, in one sentence; None if there is.
    """

    kind: str
    card: Any = None
    obstacle: str | None = None


def choose(kind: str) -> Device:
    """Return the device of this process; an emulated card is there from now on."""
    if kind == "card":
        return _emulated()
    return _real() if kind == "gpu" else Device("cpu")


def devtools(name: str) -> ModuleType:
    """A module of ``devtools/``, whose folder is a package by another name: the repository's root stays off ``sys.path``."""
    if DEVTOOLS not in sys.modules:
        spec = importlib.machinery.ModuleSpec(DEVTOOLS, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "devtools")]
        sys.modules[DEVTOOLS] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{DEVTOOLS}.{name}")


def _emulated() -> Device:
    emulation = devtools("card")
    try:
        return Device("card", emulation.Card(CARD_BYTES).install())
    except emulation.CardUnavailable as problem:
        return Device("card", obstacle=str(problem))


def _real() -> Device:
    import torch

    if not torch.cuda.is_available():
        return Device("gpu", obstacle=f"torch {torch.__version__} sees no GPU here.")
    from .card.real_card import RealCard

    return Device("gpu", RealCard())

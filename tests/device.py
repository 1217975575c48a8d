"""The device of the tests' models: ``pytest --device cpu``, ``card`` (an emulated one) or ``gpu`` (a real one).

The choice applies to a whole process: an emulated card cannot be removed, and ComfyUI chooses its device when it is
imported.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

KINDS = ("cpu", "card", "gpu")
CARD_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Device:
    """The device on which the models of this process run.

    Attributes:
        kind: One of :data:`KINDS`.
        card: The emulated card, or the object with its interface for a real one; None on a CPU.
        obstacle: Why this device is not available here, in one sentence; None if it is.
    """

    kind: str
    card: Any = None
    obstacle: str | None = None


def choose(kind: str) -> Device:
    """Return the device of this process, installing an emulated card if needed. The pack must have been loaded."""
    if kind == "card":
        return _emulated()
    return _real() if kind == "gpu" else Device("cpu")


def devtools(name: str) -> ModuleType:
    """A module of ``devtools/``."""
    return importlib.import_module(f"blockskip_pack.devtools.{name}")


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

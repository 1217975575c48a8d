"""What the models of the tests run on: ``pytest --device cpu``, ``card`` (an emulated one) or ``gpu`` (a real one).

The choice is for a whole process: an emulated card cannot be taken back, and ComfyUI looks for its device when it is imported.
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
    """Return the device of this process; an emulated card is there from now on. The pack must have been loaded."""
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

"""Unfinished runs that differ from a new one only in settings that memory or an update decides: easily lost sight of.

A plan for the memory that is free now may choose another format or batch size than before a restart. Then the same inputs
are another run, which begins at its first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import RunIdentity, about_state, is_training_state, step_of_state

BY_MEMORY = frozenset({"quantize_kept", "quantize_frozen", "batch_size", "accumulation"})
"""Parts of an identity that a plan for the memory decides on."""
CORRECTED = "correct_4bit"
"""A part that runs with blocks in 4-bit have since they are corrected."""


@dataclass(frozen=True, order=True)
class SimilarRun:
    """An unfinished run that differs from a new one only in what memory decides, or in the correction of 4-bit.

    Attributes:
        step: The step of its newest state.
        planned: Its number of steps.
        then, now: Names and values of what differs, of that run and of the new one, as lists in a sentence.
        by_memory: Whether anything differs that memory decides on.
    """

    step: int
    planned: int
    then: str
    now: str
    by_memory: bool


def similar_run(identity: RunIdentity, parent: Path) -> SimilarRun | None:
    """Return the unfinished run that has come furthest and differs only in what memory decides, or in that correction.

    None if there is none, or if the new run itself has states to resume from.

    Args:
        identity: What the new run is.
        parent: The folder of all runs' folders.
    """
    if not parent.is_dir() or any(map(is_training_state, parent.glob(f"{identity.key}/*"))):
        return None
    similar = []
    for folder in parent.iterdir():
        newest = max(filter(is_training_state, folder.glob("*")), key=step_of_state, default=None)
        about = {} if newest is None else about_state(newest)
        parts = about.get("identity")
        if not isinstance(parts, dict) or not _is_unfinished(about):
            continue
        differing = identity.difference(parts)
        if differing and {*BY_MEMORY, CORRECTED}.issuperset(differing):
            then, now = (_told(each, differing) for each in (parts, identity.parts))
            by_memory = not BY_MEMORY.isdisjoint(differing)
            similar.append(SimilarRun(about["step"], about["planned"], then, now, by_memory))
    return max(similar, default=None)


def _is_unfinished(about: Mapping[str, Any]) -> bool:
    step, planned = about.get("step"), about.get("planned")
    return isinstance(step, int) and isinstance(planned, int) and 0 < step < planned


def _told(parts: Mapping[str, Any], names: list[str]) -> str:
    """Return some parts and their values as a list."""
    values = {**parts, CORRECTED: "on" if parts.get(CORRECTED) else "off"}
    return ", ".join(f"{name} {values[name]}" if name in values else f"no {name}" for name in names)

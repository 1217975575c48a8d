"""The likeness of a run's samples to the training pictures: by step, the best step, and as a table (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import write_atomically


class ScoredSample(NamedTuple):
    """A sample and its likeness.

    Attributes:
        step: Number of training steps before it.
        prompt: Number of its prompt, from 1.
        likeness: Mean cosine of its embedding with those of the training pictures, or None if it is not known.
        picture: Name of its file.
    """

    step: int
    prompt: int
    likeness: float | None
    picture: str


def likeness_by_step(samples: Sequence[ScoredSample]) -> dict[int, float]:
    """Return the mean over the prompts of every step whose samples all have a likeness."""
    by_step: dict[int, list[float | None]] = {}
    for sample in samples:
        by_step.setdefault(sample.step, []).append(sample.likeness)
    known = {step: [value for value in values if value is not None] for step, values in by_step.items()}
    return {step: sum(values) / len(values) for step, values in known.items() if len(values) == len(by_step[step])}


def likeness_in_words(by_step: Mapping[int, float], files: Mapping[int, str]) -> str:
    """Return which step's samples are most alike, and the LoRA of that step, in words; "" without any.

    Args:
        by_step: See :func:`likeness_by_step`.
        files: Step -> name of the LoRA's file of that step, of those that are kept.
    """
    if not by_step:
        return ""
    best, last = max(by_step, key=lambda step: (by_step[step], -step)), max(by_step)
    file = files.get(best, "before training" if best == 0 else "no checkpoint of that step is kept")
    words = f"most alike after step {best:,}: {by_step[best]:.4f} ({file})"
    return words if best == last else f"{words}; after step {last:,}: {by_step[last]:.4f}"


def write_likeness_table(samples: Sequence[ScoredSample], path: Path) -> None:
    """Write the columns step, prompt, likeness and picture.

    Raises:
        StorageError: If it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(ScoredSample._fields)
            table.writerows(samples)

    write_atomically(path, write)

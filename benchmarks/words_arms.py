"""The arms of the benchmark ``words``: ways to learn a word, each with the same number of forward passes but for those named so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORWARDS = 1440
WORD_WIDTH = 64  # of the world's text encoder
PAPER = {
    "estimator": "forward difference", "directions": 2, "perturbation": 0.072, "step_size": 0.36, "schedule": "constant",
    "lowest": 0.62, "highest": 0.89, "subspace_every": 128, "mirror": False, "pool": 0,
}  # fmt: skip
"""The paper's settings in units of a word's numbers, with the noise levels that have its signal-to-noise ratios. Mirrored
pictures are off in all arms: the world's captions say left and right."""


@dataclass(frozen=True)
class WordArm:
    """A way to learn a word.

    Attributes:
        name: Its name in the table.
        group: The part of the table.
        gradient: Whether gradients come from backward passes; then ``settings`` are batch and step_size. A backward pass
            costs about two forward passes, so "equal time" is a third of the forward passes.
        settings: Changes to the defaults of ``WordSettings``.
        forwards: Forward passes.
        seeds: Number of seeds; 1 for trials beside the comparisons.
        vectors: Vectors of the word.
        way: What is learned in place of a word, a name of ``words_stronger.WAYS``.
        stored: The format of the model's weights while the word is learned, a name of ``words_formats.FORMATS``; it is
            judged in float32, as the others.
        orthogonal: Whether a step's directions are orthogonal (``words_orthogonal``).
    """

    name: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    gradient: bool = False
    forwards: int = FORWARDS
    seeds: int = 3
    vectors: int = 1
    way: str = ""
    stored: str = "fp32"
    orthogonal: bool = False


def _gradient(name: str, step_size: float, **more: Any) -> WordArm:
    return WordArm(name, "gradient", {"batch": 4, "step_size": step_size}, gradient=True, **more)


def _as_informed(passes: int, step_size: float) -> WordArm:
    """Return a gradient arm that learns as many numbers about the slope as the defaults do in so many forward passes.

    A step with n directions tells n - 1 numbers; a gradient tells one for each of the word's :data:`WORD_WIDTH`.
    """
    directions = 8
    known = passes // directions * (directions - 1) // WORD_WIDTH
    name = f"{known} gradients, as informed as {passes:,} passes, step {step_size:g}".replace("0.", ".")
    return WordArm(name, "limit", {"batch": 1, "step_size": step_size}, gradient=True, forwards=known)


def _paper(name: str, seeds: int = 3, **changes: Any) -> WordArm:
    return WordArm(name, "paper", {**PAPER, **changes}, seeds=seeds)


def _ablation(name: str, seeds: int = 3, **changes: Any) -> WordArm:
    return WordArm(name, "ablations", {"pool": 0, **changes}, seeds=seeds)


def _stored(stored: str) -> WordArm:
    return WordArm(f"learned in {stored}", "stored", stored=stored)


def _stronger(way: str, step_size: float = 0.4, seeds: int = 2) -> WordArm:
    name = way if step_size == 0.4 else f"{way}, step {step_size:g}".replace("0.", ".")
    return WordArm(name, "stronger", {"step_size": step_size}, way=way, seeds=seeds)


ARMS = (
    _gradient("gradient, batch 4, step .2", 0.2),
    WordArm("defaults", "defaults"),
    WordArm("defaults, twice the passes", "defaults", forwards=2 * FORWARDS),
    _paper("the paper's"),
    *map(_stored, ("bf16", "fp8 scaled", "int8", "int8 convrot", "nvfp4")),
    WordArm("word of 2 vectors", "stronger", vectors=2, seeds=2),
    _stronger("2 vectors after the encoder"),
    _stronger("shift of the pooled text"),
    _stronger("shift of the pooled text", 0.1),
    _stronger("shift of the modulation", seeds=1),
    _stronger("shift of the modulation", 0.1),
    _stronger("LoRA cores, 2 x 2", seeds=1),
    _stronger("LoRA cores, 2 x 2", 0.1),
    _gradient("gradient, equal time", 0.2, forwards=FORWARDS // 3),
    *(_as_informed(passes, step_size) for passes in (FORWARDS, 2 * FORWARDS) for step_size in (0.2, 0.4)),
    _ablation("new examples in every step"),
    WordArm("new examples in every step, twice the passes", "ablations", {"pool": 0}, forwards=2 * FORWARDS),
    WordArm("256 examples, step .2, twice the passes", "ablations", {"step_size": 0.2}, forwards=2 * FORWARDS, seeds=1),
    WordArm(
        "new examples, step .2, twice the passes", "ablations", {"pool": 0, "step_size": 0.2}, forwards=2 * FORWARDS, seeds=1
    ),
    _ablation("subspace, tau 16", subspace_every=16),
    _ablation("levels .62 to .89", lowest=0.62, highest=0.89),
    _ablation("central, 4 directions", estimator="central", directions=4),
    _ablation("forward difference, 8 directions", estimator="forward difference"),
    _ablation("4 directions", directions=4),
    _ablation("16 directions", directions=16),
    WordArm("256 examples, orthogonal directions", "ablations", orthogonal=True),
    _ablation("constant step", schedule="constant"),
    _paper("the paper's without subspace", subspace_every=0),
    _paper("the paper's without partial levels", lowest=0.0, highest=1.0),
    _paper("the paper's without either", lowest=0.0, highest=1.0, subspace_every=0),
    _paper("the paper's, tau 16", seeds=1, subspace_every=16),
    _gradient("gradient, batch 4, step .1", 0.1, seeds=1),
    WordArm("word of 4 vectors", "stronger", vectors=4, seeds=1),
    _stronger("8 vectors after the encoder", seeds=1),
    _stronger("LoRA cores, 4 x 4", 0.1, seeds=1),
)  # fmt: skip
"""In the order in which they are run: an early end leaves whole comparisons."""
NAMES = tuple(arm.name for arm in ARMS)

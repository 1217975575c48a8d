"""The arms of the benchmark ``words``: ways to learn a word, each with the same number of forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORWARDS = 1440
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
        gradient: Whether gradients come from backward passes; then ``settings`` are batch, step_size, lowest and
        highest.
        settings: Changes to the defaults of ``WordSettings``.
        forwards: Forward passes.
    """

    name: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    gradient: bool = False
    forwards: int = FORWARDS


def _gradient(name: str, batch: int, step_size: float, **more: Any) -> WordArm:
    return WordArm(name, "gradient", {"batch": batch, "step_size": step_size, **more}, gradient=True)


def _paper(name: str, **changes: Any) -> WordArm:
    return WordArm(name, "paper", {**PAPER, **changes})


def _ablation(name: str, **changes: Any) -> WordArm:
    return WordArm(name, "ablations", {"pool": 0, **changes})


ARMS = (
    _gradient("gradient, batch 4, step .1", 4, 0.1),
    _gradient("gradient, batch 4, step .2", 4, 0.2),
    _paper("the paper's"),
    _paper("the paper's, tau 16", subspace_every=16),
    _paper("the paper's without subspace", subspace_every=0),
    _paper("the paper's without partial levels", lowest=0.0, highest=1.0),
    _paper("the paper's without either", lowest=0.0, highest=1.0, subspace_every=0),
    WordArm("defaults", "defaults"),
    _ablation("new examples in every step"),
    WordArm("new examples in every step, twice the passes", "ablations", {"pool": 0}, forwards=2 * FORWARDS),
    _ablation("central, 4 directions", estimator="central", directions=4),
    _ablation("forward difference, 8 directions", estimator="forward difference"),
    _ablation("4 directions, step .3", directions=4, step_size=0.3),
    _ablation("step .2", step_size=0.2),
    _ablation("step .8", step_size=0.8),
    _ablation("constant step", schedule="constant"),
    _ablation("perturbation .05", perturbation=0.05),
    _ablation("perturbation .5", perturbation=0.5),
    _ablation("subspace, tau 16", subspace_every=16),
    _ablation("levels .62 to .89", lowest=0.62, highest=0.89),
)  # fmt: skip

"""The settings of a run, and the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InvalidInputError
from .estimators import EstimatorName, estimator

StepSizeSchedule = Literal["cosine", "constant"]
MOST_DIRECTIONS = 4096

CLIP_L_SIZE = 0.0139
"""Root mean square of the numbers in CLIP-L's vocabulary; the paper's settings are in plain numbers of that encoder."""


@dataclass(frozen=True, kw_only=True)
class WordSettings:
    """How a word is learned. ``benchmarks/words.py`` compares the defaults with the paper's settings and others.

    Attributes:
        steps: Number of steps.
        seed: Determines directions and examples.
        estimator: How gradients are estimated.
        directions: n, the number of directions per step.
        perturbation: mu, in sizes of an ordinary word's numbers.
        step_size: Largest change of a number in one step, in the same unit.
        schedule: Whether the step size falls to 0 along a cosine, or stays.
        lowest, highest: Bounds of the noise levels, shares of the model's training time.
        pool: Number of fixed examples; 0 draws a new one for each step.
        mirror: Whether half of the examples are mirrored.
        subspace_every, subspace_share: tau and nu of the subspace gradient; 0 steps turn it off.
        epsilon: Adam's, for gradients in the same unit.

    Raises:
        InvalidInputError: If a value is out of range. Ranges that concern one part only are checked by that part.
    """

    steps: int
    seed: int = 0
    estimator: EstimatorName = "leave-one-out"
    directions: int = 8
    perturbation: float = 0.2
    step_size: float = 0.4
    schedule: StepSizeSchedule = "cosine"
    lowest: float = 0.0
    highest: float = 1.0
    pool: int = 256
    mirror: bool = False
    subspace_every: int = 0
    subspace_share: float = 1e-3
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        least = estimator(self.estimator).least
        if self.steps < 1:
            raise InvalidInputError(f"There must be at least one step, got {self.steps}.")
        if not least <= self.directions <= MOST_DIRECTIONS:
            raise InvalidInputError(
                f"{self.estimator} needs {least} to {MOST_DIRECTIONS} directions, got {self.directions}."
            )
        for name in ("perturbation", "step_size", "epsilon"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise InvalidInputError(f"{name} must be a positive number, got {value}.")
        if self.schedule not in get_args(StepSizeSchedule):
            known = ", ".join(get_args(StepSizeSchedule))
            raise InvalidInputError(f"The step size's schedule must be one of {known}, got {self.schedule!r}.")

    @property
    def passes_per_step(self) -> int:
        """Forward passes of the model in one step."""
        return estimator(self.estimator).passes(self.directions)

    def step_size_at(self, step: int) -> float:
        """Return the step size of a step, from 0."""
        share = 1.0 if self.schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.step_size * share


def paper_settings(steps: int, seed: int, *, lowest: float = 0.5, highest: float = 0.9) -> WordSettings:
    """Return the settings of ZOODiP (arXiv 2503.14868) for SD1.5, in this package's units.

    n = 2, mu = 1e-3, step size 5e-3 (constant), tau = 128, nu = 1e-3, t from 500 to 900 of 1000, 30,000 steps there;
    Adam with the epsilon of its code, 1e-3. Its code has a step size of 1e-2.

    Args:
        steps, seed: As in :class:`WordSettings`.
        lowest, highest: The noise levels; for flow-matching models those with the same signal-to-noise ratio are .62,
        .89.
    """
    return WordSettings(
        steps=steps, seed=seed, estimator="forward difference", directions=2, perturbation=1e-3 / CLIP_L_SIZE,
        step_size=5e-3 / CLIP_L_SIZE, schedule="constant", lowest=lowest, highest=highest, pool=0, mirror=True,
        subspace_every=128, subspace_share=1e-3, epsilon=1e-3 * CLIP_L_SIZE,
    )  # fmt: skip

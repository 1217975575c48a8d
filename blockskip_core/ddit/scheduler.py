"""The patch size of the next step, decided while sampling.

Source: DDiT (arXiv 2602.16968, Eq. 5): the largest patch whose variation is below tau, otherwise the model's own.

Additions that the paper does not have, because without them the choice flips at every step or never returns (a switch of
patch size looks like a change of the picture, and a coarse trajectory is smooth by itself):

- after a switch the size is held for some steps (``hold``);
- a coarse run ends after at most ``longest_run`` steps with at least one step of the model's own size.

With ``literal`` neither applies, and latents are compared as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..errors import InvalidInputError
from .third_difference import POINTS, History, Point, literal, normalised, variation

Criterion = Literal["third difference", "third difference (as published)"]
CRITERIA: tuple[str, ...] = get_args(Criterion)


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """The settings of the decision.

    Attributes:
        tau: Threshold of the variation per step of 1/50; 0.001 in the paper.
        percentile: rho; 0.4 in the paper.
        criterion: Ours or the paper's.
        hold: Steps for which a size is held after a switch, at least; with 3 the four points of a difference agree.
        longest_run: Coarse steps in a row, at most; 0 for no limit.
        first_own: Steps of the model's own size at the start, at least.
        last_own: And at the end.

    Raises:
        InvalidInputError: If a setting is out of range.
    """

    tau: float = 0.001
    percentile: float = 0.4
    criterion: Criterion = "third difference"
    hold: int = 3
    longest_run: int = 6
    first_own: int = 1
    last_own: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.tau < math.inf:
            raise InvalidInputError(f"tau must be positive and finite, got {self.tau}.")
        if not 0.0 <= self.percentile <= 1.0:
            raise InvalidInputError(f"percentile must be between 0 and 1, got {self.percentile}.")
        if self.criterion not in CRITERIA:
            raise InvalidInputError(f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}.")
        for name in ("hold", "longest_run", "first_own", "last_own"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} must not be negative, got {getattr(self, name)}.")


class DynamicScheduler:
    """Decides the patch sizes of one run.

    Args:
        settings: See :class:`SchedulerSettings`.
        sides: Scale -> side of its patch in cells, for every coarse size.
        steps: Number of steps of the run.
        frames: Of the latent.

    Attributes:
        variations: Per decision, scale -> variation, of the picture of the batch that varies most; for reports.
    """

    def __init__(self, settings: SchedulerSettings, sides: Mapping[int, int], steps: int, frames: int = 1) -> None:
        self._settings, self._sides, self._steps, self._frames = settings, dict(sides), steps, frames
        self._history = History()
        self._latents: list[Point] = []
        self._scale, self._held, self._run = 1, settings.hold, 0
        self.variations: list[dict[int, float]] = []

    def possible(self) -> Collection[int]:
        """Return the scales that a step may get."""
        return [1, *self._sides]

    def decide(self, step: int, sigma: float, latent: Tensor) -> int:
        """Return the scale of a step; called once per step, in order.

        Args:
            step: Number of the step, from 0.
            sigma: Its noise level.
            latent: The noisy latent before it, (B, C, H, W).
        """
        self._latents = [*self._latents[1 - POINTS :], Point(sigma, latent)]
        wanted = self._wanted()
        own = step < self._settings.first_own or step >= self._steps - self._settings.last_own
        if self._settings.criterion == CRITERIA[0]:
            wanted = self._without_flips(wanted)
        self._switch_to(1 if own else wanted)
        return self._scale

    def made(self, sigma: float, clean: Tensor) -> None:
        """Take the clean estimate of the step that was decided last, (B, C, H, W)."""
        self._history.add(sigma, clean, self._scale)

    def _wanted(self) -> int:
        """Return the largest scale whose variation is below tau; batches follow the picture that varies most."""
        published = self._settings.criterion != CRITERIA[0]
        if not (len(self._latents) >= POINTS if published else self._history.is_complete):
            self.variations.append({})
            return 1
        difference = literal(self._latents) if published else normalised(self._history.points)
        found = {
            scale: float(variation(difference, side, self._settings.percentile, self._frames).max())
            for scale, side in self._sides.items()
        }
        self.variations.append(found)
        return max((scale for scale, value in found.items() if value < self._settings.tau), default=1)

    def _without_flips(self, wanted: int) -> int:
        if self._settings.longest_run and self._run >= self._settings.longest_run:
            return 1
        return wanted if self._held >= self._settings.hold else self._scale

    def _switch_to(self, scale: int) -> None:
        self._held = self._held + 1 if scale == self._scale else 1
        self._run = self._run + 1 if scale > 1 else 0
        self._scale = scale

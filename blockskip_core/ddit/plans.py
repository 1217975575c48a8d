"""How the patch size of every step of a run is chosen: fixed before it, or decided in it.

A plan is made before sampling and knows nothing of a run; :meth:`PatchPlan.begin` gives the choice of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .error_table import ErrorTable
from .scheduler import DynamicScheduler, SchedulerSettings
from .windows import scales_in_windows, scales_within_budget


class PatchChoice(Protocol):
    """The patch sizes of one run, step by step."""

    def possible(self) -> Collection[int]:
        """Return the scales that a step may get."""
        ...

    def decide(self, step: int, sigma: float, latent: Tensor) -> int:
        """Return the scale of a step before it is made; ``latent`` is (B, C, H, W), or (B, C F, H, W) of a clip."""
        ...

    def made(self, sigma: float, clean: Tensor) -> None:
        """Take the clean estimate that the step gave."""
        ...


class PatchPlan(Protocol):
    """A way of choosing patch sizes."""

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> PatchChoice:
        """Return the choice of a run.

        Args:
            sigmas: Its noise levels, one more than steps.
            tokens: Image tokens of a step with the model's own patches, of all frames.
            frames: Of the latent.

        Raises:
            InvalidInputError: If the plan does not fit the run.
        """
        ...


@dataclass(frozen=True)
class FixedScales:
    """A :class:`PatchChoice` made before the run.

    Attributes:
        scales: Of every step.
    """

    scales: Sequence[int]

    def possible(self) -> Collection[int]:
        return self.scales

    def decide(self, step: int, sigma: float, latent: Tensor) -> int:
        return self.scales[step]

    def made(self, sigma: float, clean: Tensor) -> None:
        """Need nothing."""


@dataclass(frozen=True)
class TypedWindows:
    """Windows as text; see ``windows``.

    Attributes:
        text: Such as "2-9: 2".
        known: Scales with an adapter.
    """

    text: str
    known: Sequence[int]

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> FixedScales:
        return FixedScales(scales_in_windows(self.text, len(sigmas) - 1, self.known))


@dataclass(frozen=True)
class EveryOther:
    """Every other step is coarse, so that a step with the model's own patches follows each.

    Not the paper's, which decides while sampling; of what was compared at equal operations it kept the most likeness at 256 px
    (``docs/ddit.md``).

    Attributes:
        scale: Of the coarse steps.
        first_own, last_own: Steps of the model's own size at the start and at the end, at least.
    """

    scale: int
    first_own: int = 1
    last_own: int = 1

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> FixedScales:
        scales = [1] * (len(sigmas) - 1)
        for step in range(self.first_own, len(scales) - self.last_own, 2):
            scales[step] = self.scale
        return FixedScales(scales)


@dataclass(frozen=True)
class ErrorBudget:
    """The most coarse steps that an error budget allows.

    Attributes:
        budget: See ``error_table.spent``.
        tables: Scale -> error.
        operations: Image tokens of a step with the model's own patches -> scale -> operations, also of scale 1.
        first_own, last_own: Steps of the model's own size at the start and at the end.
    """

    budget: float
    tables: Mapping[int, ErrorTable]
    operations: Callable[[int], Mapping[int, float]]
    first_own: int = 1
    last_own: int = 1

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> FixedScales:
        operations = self.operations(tokens)
        found = scales_within_budget(
            sigmas, self.tables, operations, self.budget, first_own=self.first_own, last_own=self.last_own
        )
        return FixedScales(found)


@dataclass(frozen=True)
class DecidedWhileSampling:
    """The paper's way; see ``scheduler``.

    Attributes:
        settings: Of the decision.
        sides: Scale -> side of its patch in cells.
    """

    settings: SchedulerSettings
    sides: Mapping[int, int]

    def begin(self, sigmas: Sequence[float], tokens: int, frames: int = 1) -> DynamicScheduler:
        return DynamicScheduler(self.settings, self.sides, len(sigmas) - 1, frames)

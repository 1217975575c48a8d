"""Noise levels of the steps that will be coarse, for adapters that are trained on these levels alone.

Not in the paper (DDiT, arXiv 2602.16968), which decides while sampling. Where the plan is known before the training, its own
steps say at which noise levels a coarse call will be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError
from .plans import EveryOther, TypedWindows
from .windows import typed_windows


@dataclass(frozen=True)
class CoarseSteps:
    """The steps of a sampler that will be coarse.

    Attributes:
        steps: Of the sampler.
        windows: The coarse ones, such as "2-9: 2" (see ``windows``); None for every other step.

    Raises:
        InvalidInputError: If there are no steps, or the text is not one of windows.
    """

    steps: int
    windows: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidInputError(f"A sampler needs at least 1 step, got {self.steps}.")
        typed_windows(self.windows or "")

    def levels(
        self, sigmas: Sequence[float], scale: int, known: Sequence[int], *, within: tuple[float, float] = (0.0, 1.0),
        least: float = 0.0,
    ) -> CoarseLevels:  # fmt: skip
        """Return the noise levels of the steps that are coarse with patches of one size.

        Every other step is every other one for each size: a sampler will use one of them.

        Args:
            sigmas: Noise levels of the sampler, falling from at most 1, one more than ``steps``.
            scale: The patch size.
            known: All patch sizes that windows may name.
            within: Lowest and highest level of the model. If it shares the levels with another model, steps count from its
                own first one, as in a sampler of its own.
            least: Levels below this are left out.

        Raises:
            InvalidInputError: If windows do not fit the steps or sizes, or none of these levels is of a coarse step.
        """
        low, high = within
        own = sigmas[sum(sigma > high for sigma in sigmas) : sum(sigma > low for sigma in sigmas) + 1]
        plan = EveryOther(scale) if self.windows is None else TypedWindows(self.windows, known)
        scales = plan.begin(own, 0).scales if len(own) > 1 else []
        steps = [
            (min(own[k], high), max(own[k + 1], low, least)) for k, of_step in enumerate(scales) if of_step == scale
        ]
        intervals = tuple((start, end) for start, end in steps if start > end)
        if not intervals:
            raise InvalidInputError(
                f"There is nothing to train patches of {scale}x on: of the coarse steps, {self.describe()}, none has patches "
                f"of this size and noise levels within {low:g} to {high:g}. Name more steps, or train on all levels."
            )
        return CoarseLevels(intervals)

    def describe(self) -> str:
        """Return the steps as a few words, such as "every other of 20"."""
        which = "every other" if self.windows is None else self.windows.strip() or "none"
        return f"{which} of {self.steps}"


@dataclass(frozen=True)
class CoarseLevels:
    """Noise levels of coarse steps; each step has the same share of the examples.

    Attributes:
        intervals: (start, end) in noise level of every coarse step, falling.
    """

    intervals: tuple[tuple[float, float], ...]

    def __call__(self, uniform: float) -> float:
        """Return the noise level of a number from 0 (the highest level) to 1 (the lowest), linear within a step."""
        place = uniform * len(self.intervals)
        step = min(int(place), len(self.intervals) - 1)
        start, end = self.intervals[step]
        return start + (place - step) * (end - start)

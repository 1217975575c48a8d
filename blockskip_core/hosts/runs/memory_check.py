"""Check before a run starts whether it will fit, and decide where its weights are kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property

from ...accounting.memory_needs import MemoryNeeds
from ...accounting.plan import MemorySettings, Verdict, changes_that_fit, fits, verdict_on_training
from ...errors import BlockSkipError, TrainingError
from ...model import WeightPlacement
from ..models.counted_run import CountedRun, UncountableError, counting, room_on
from ..models.quantised_blocks import formats_on
from .plan_text import advice
from .prepare import PreparedRun
from .view import RunProgress

logger = logging.getLogger(__name__)


class MemoryCheck:
    """Counts a run if a rough upper bound does not fit, refuses it if it cannot fit, and warns if it will be slow.

    The bound is twice the rule of thumb of ``estimated_step_bytes``; tests check that it is not less than the count.

    Args:
        run: The run.
        progress: Shows what is counted.
        problems: Receives a sentence if the run can start despite a problem.
    """

    def __init__(self, run: PreparedRun, progress: RunProgress, problems: list[str]) -> None:
        self._run, self._progress, self._problems = run, progress, problems
        self._on_cpu = run.dit.device.type == "cpu"  # the weights are already in that memory
        self._streamed = run.request.kept_weights == "streamed"

    @property
    def training_peak(self) -> int:
        """Approximate bytes that the run needs on the device, weights included."""
        return self._resident_bytes + self._run.step_bytes

    def placement(self) -> WeightPlacement:
        """Return where the weights are kept: "resident" if the run fits by count.

        Otherwise the host would stream some weights to keep its own reserve free.

        Raises:
            TrainingError: If not even a step without its weights fits, unless `check_memory` is off.
        """
        good: WeightPlacement = "streamed" if self._streamed else "resident"
        otherwise: WeightPlacement = "streamed" if self._streamed else "as fits"
        if self._has_finished:
            return otherwise
        available, place = room_on(self._run.dit.device)
        plenty = fits(self._resident_bytes + 2 * self._run.step_bytes, available)
        return good if plenty or self._fits_by_count(available, place) else otherwise

    @property
    def _has_finished(self) -> bool:
        """Whether an earlier run has already made all steps."""
        steps = self._run.request.steps
        state = self._run.checkpoints.newest(steps)
        return state is not None and state.step >= steps

    def _fits_by_count(self, available: int, place: str) -> bool:
        """Count the run and return whether it fits; if not, raise an error or note a problem."""
        self._progress("counting memory", 1, 2)
        try:
            with counting(passed_on=BlockSkipError):
                verdict = self._verdict(available, place)
        except UncountableError as error:
            logger.exception("BlockSkip: memory could not be counted")
            self._problems.append(f"The memory of this run could not be counted ({error}). It was started anyway.")
            return False
        if self._run.request.check_memory and not verdict.starts:
            raise TrainingError(f"{verdict.problem} Or switch `check_memory` off to try anyway.")
        if verdict.problem:
            logger.warning("BlockSkip: %s", verdict.problem)
            self._problems.append(verdict.problem)
        return not verdict.problem

    def _verdict(self, available: int, place: str) -> Verdict:
        """Count the training, and find what would help if it does not fit."""
        counted, settings = self._count(self._settings).training, self._settings
        streamed = 0 if self._on_cpu else self._counted_run.streamed_bytes(settings)
        verdict = verdict_on_training(counted.peak, counted.weights, streamed, available, place)
        if not verdict.problem or (verdict.starts and self._streamed):  # streaming means moving weights
            return Verdict(True)
        found = changes_that_fit(settings, available, self._count, formats_on(self._run.dit.device))
        problem = f"{verdict.problem} {advice(found)}"
        if self._run.request.memory_settings is not None:
            problem += " Some of these are set on Memory Plan."
        return replace(verdict, problem=problem)

    def _count(self, settings: MemorySettings) -> MemoryNeeds:
        needs = self._counted_run.needs(settings)
        if self._on_cpu:
            needs = needs.without_weights()
        return replace(needs, precomputing=None) if settings.storage == "disk" else needs  # already done

    @cached_property
    def _counted_run(self) -> CountedRun:
        residuals = self._run.residuals
        return CountedRun(
            self._run.dit,
            residuals.selection,
            self._run.request.lora,
            captions=len(residuals.captions),
            draws=len(residuals.schedule),
            chunk_size=residuals.chunk_size,
            linear=residuals.back_residual == "linear",
            residual_format=residuals.identity.residual_format,
        )

    @cached_property
    def _settings(self) -> MemorySettings:
        return self._run.request.memory(self._run.residuals)

    @cached_property
    def _resident_bytes(self) -> int:
        """Bytes of the weights that a step keeps on the device."""
        return 0 if self._on_cpu or self._streamed else self._counted_run.trained_weights(self._settings)

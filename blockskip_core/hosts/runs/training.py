"""A prepared run from the check of its memory to its files: train, save however it ends, report."""

from __future__ import annotations

import logging

import comfy.model_management

from ...errors import TrainingError
from ...model import WeightPlacement
from ...residuals.sources import source_of
from ...training.checkpoints import KEPT_RUNS, remove_old_runs
from ...training.loop import train_lora
from ...training.loss_scale import remark_on
from ...training.observer import OnStep, TrainingObserver
from ...training.quantisation_offsets import QuantisationOffsets
from ...training.result import StepReport
from ...training.shared_residuals import write_cache_together
from ...training.similar_runs import similar_run
from ...training.together import Together
from ..files.folders import run_folder
from ..files.lora_files import ReservedName
from ..models.out_of_memory import (
    OutOfMemoryError,
    is_out_of_memory,
    log_and_release,
    out_of_memory_explained,
)
from ..models.quantised_blocks import QuantisedDit
from ..models.residency import evict_others
from .events import RunEvents
from .figures import outcome_line
from .files import RunFiles
from .memory_check import MemoryCheck
from .outcome import RunOutcome
from .peak_memory import PeakMemory
from .prepare import PreparedRun
from .view import RunProgress, RunView

logger = logging.getLogger(__name__)

ADVICE = (
    "Lower `patch_min` or `batch_size`, set `activation_budget` to 0, or skip more blocks at Select Blocks; Memory "
    "Plan shows what fits."
)


def carry_out(run: PreparedRun, progress: RunProgress, view: RunView, together: Together = Together()) -> RunOutcome:  # noqa: B008
    """Train as prepared, save the LoRA, and return what came of it.

    Args:
        run: The run.
        progress: Shows what it does.
        view: Follows it.
        together: The processes that share it. Only process 0 writes files; the others wait for it where they need them.

    Raises:
        BlockSkipError: If the run cannot start or continue; the message names the file with the LoRA so far. Any other
            exception, including Cancel, is passed on after the LoRA so far has been saved.
    """

    def wait_for_another(step: int) -> None:
        progress(
            "waiting for another process that trains the same run", min(step, run.request.steps), run.request.steps
        )

    removed = remove_old_runs(run_folder(run.identity.key).parent, keep=KEPT_RUNS - 1, exclude=run.identity.key)
    with ReservedName(run.path) as name, run.checkpoints.to_itself(wait_for_another):
        outcome = RunOutcome(PeakMemory(run.dit.device), name)
        outcome.result.problems.extend(removed)
        if run.request.resume and (said := _on_similar_run(run)):
            progress.say(said)
            outcome.result.problems.append(said)
        _Training(run, outcome, progress, view, together).train()
    progress.say(outcome_line(outcome))
    return outcome


def help_along(run: PreparedRun, progress: RunProgress, view: RunView, together: Together) -> None:
    """Train this process's share of a run that process 0 carries out; nothing is written.

    Args:
        run, progress, view, together: As for :func:`carry_out`; the view is only told of steps.

    Raises:
        BlockSkipError: If the run cannot start or continue.
    """
    outcome = RunOutcome(PeakMemory(run.dit.device), None)
    with out_of_memory_explained("Training", ADVICE):
        _Training(run, outcome, progress, view, together).share()


class _Training:
    """The training of a prepared run: memory check before, files after, and a second try if memory runs out."""

    def __init__(
        self, run: PreparedRun, outcome: RunOutcome, progress: RunProgress, view: RunView, together: Together
    ) -> None:
        self._run, self._outcome, self._progress, self._view = run, outcome, progress, view
        self._together = together
        self._memory_check = MemoryCheck(run, progress, outcome.result.problems)
        self._observers: list[TrainingObserver] = []
        self._offsets = QuantisationOffsets(run.dit, progress, apart=outcome.memory.apart) if run.corrected else None

    def train(self) -> None:
        """Train, and save the LoRA however the run ends, if it has learned anything.

        Raises:
            TrainingError, OutOfMemoryError: If training cannot continue; the message names the file with the LoRA so
                far.
            StorageError: If a run that ended early cannot be saved.
        """
        result = self._outcome.result
        if self._run.residuals.dropped:
            logger.info("BlockSkip: %s", self._run.residuals.on_dropped)
        result.problems.extend([*self._run.residuals.remarks, *_on_ranks(self._run)])
        files = RunFiles(self._run, self._outcome)
        peak = self._memory_check.training_peak
        events = [RunEvents(self._run, self._outcome)] if self._run.request.tensorboard else []
        self._observers = [files, *self._view.observers(self._run, self._outcome, peak), *events]
        try:
            self._train()
        except (TrainingError, OutOfMemoryError) as error:
            if not result.steps:
                raise
            self._save_early(files)
            saved = f"The LoRA so far is saved as {self._outcome.path.name}."
            raise type(error)(f"{error} {saved}") from None
        except BaseException:  # including Cancel at any moment
            if result.steps:
                self._save_early(files)
            raise
        finally:
            self._view.ended()
            for each in events:
                each.close()
        result.problems.extend(remark_on(result.overflows))
        files.save_finished()
        self._view.saved()

    def share(self) -> None:
        """Train this process's share; process 0 does the rest."""
        self._observers = list(self._view.observers(self._run, self._outcome, self._memory_check.training_peak))
        self._run_loop(self._placed())

    def _save_early(self, files: RunFiles) -> None:
        files.save_early()
        self._view.saved()

    def _train(self) -> None:
        placement = self._placed()
        ran_out = self._runs_out_of_memory(placement)
        if ran_out is not None:
            self._continue_streamed(placement, ran_out)

    def _placed(self) -> WeightPlacement:
        """Check the memory, make room, and return where the weights are kept."""
        placement = self._memory_check.placement()
        evict_others(self._run.dit.patcher)
        self._outcome.memory.restart()  # text encoder and VAE are not part of the run's peak
        if isinstance(self._run.trained_dit, QuantisedDit):
            with out_of_memory_explained("Quantising the blocks", ADVICE):
                self._run.trained_dit.quantise(lambda done, total: self._progress("layers quantised", done, total))
        return placement

    def _continue_streamed(self, placement: WeightPlacement, said: str) -> None:
        """Continue a run that ran out of memory from its last checkpoint, with its weights streamed.

        Raises:
            OutOfMemoryError: If they were already streamed, there are none to stream, or memory runs out again.
        """
        result, run = self._outcome.result, self._run
        failed = f"Training ran out of memory after step {result.steps} ({said})."
        if not self._can_stream(placement):
            raise OutOfMemoryError(f"{failed} {ADVICE}")
        problem = f"{failed} It continued with streamed weights, which is slower. {ADVICE}"
        logger.warning("BlockSkip: %s", problem)
        result.problems.append(problem)
        resumed_at = result.resumed_at

        def keep_resumed_at(_: StepReport) -> None:  # this time the run resumes from its own state
            result.resumed_at = resumed_at

        self._observers.insert(0, OnStep(keep_resumed_at))
        run.adapters.load_state_dict(run.first_values)
        result.steps = 0
        result.losses.clear()
        run.checkpoints.resume = True
        comfy.model_management.soft_empty_cache()
        again = self._runs_out_of_memory("streamed")
        if again is not None:
            raise OutOfMemoryError(f"Training ran out of memory even with streamed weights ({again}). {ADVICE}")

    def _can_stream(self, placement: WeightPlacement) -> bool:
        """Return whether there are weights on the device that could be streamed instead, and no process to wait for it."""
        return self._together.size == 1 and placement != "streamed" and self._run.dit.device.type != "cpu"

    def _runs_out_of_memory(self, placement: WeightPlacement) -> str | None:
        """Train; if memory runs out, release everything and return the allocator's message, otherwise None."""
        try:
            self._run_loop(placement)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return log_and_release(error)
        return None

    def _run_loop(self, placement: WeightPlacement) -> None:
        run = self._run
        if self._together.size > 1 and run.residuals.storage == "disk":
            write_cache_together(run.residuals, run.dit, self._progress, self._together)
        train_lora(
            run.trained_dit,
            run.residuals.schedule,
            run.residuals.latents,
            run.residuals.selection,
            source_of(run.residuals, run.dit, self._progress),
            run.adapters,
            run.request.config,
            result=self._outcome.result,
            observers=self._observers,
            activation_bytes=run.step_bytes,
            weights=placement,
            checkpoints=run.checkpoints,
            together=self._together,
            offsets=self._offsets,
        )


def _on_similar_run(run: PreparedRun) -> str:
    """Return a sentence on an unfinished run that this one may have been meant to continue, and log it; or nothing."""
    similar = similar_run(run.identity, run_folder(run.identity.key).parent)
    if similar is None:
        return ""
    said = (
        f"This is not the unfinished run of step {similar.step} of {similar.planned}, which had {similar.then}; this one has "
        f"{similar.now}."
    )
    if similar.by_memory:
        said += (
            " Memory Plan goes by the memory that is free, unless its `preset` names your card. To go on with that run, set "
            "these values on Dynamic Patch Trainer, without Memory Plan's `settings`."
        )
    else:
        said += " To go on with that run, change this on Dynamic Patch Trainer."
    logger.warning("BlockSkip: %s", said)
    return said


def _on_ranks(run: PreparedRun) -> list[str]:
    """Return a sentence on layers that got less than the requested rank, if there are any."""
    narrow = run.adapters.narrow_layers
    if not narrow:
        return []
    return [
        f"rank {run.request.rank} is more than {len(narrow)} of {len(run.adapters.names)} layers can use: their rank "
        f"is their smaller side, at least {min(narrow.values())}."
    ]

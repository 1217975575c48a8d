"""The files of a run: the LoRA, its checkpoints during training, and the summary beside it."""

from __future__ import annotations

import logging
from pathlib import Path

from ...adapters.lora_formats import to_file_tensors
from ...errors import StorageError
from ...reporting.likeness_table import write_likeness_table
from ...reporting.loss_table import write_loss_table
from ...reporting.run_report import write_report
from ...training.observer import TrainingObserver
from ...training.result import StepReport
from ..files.lora_files import save_lora
from .figures import checkpoint_path, metadata, report
from .outcome import RunOutcome
from .prepare import PreparedRun

logger = logging.getLogger(__name__)


class RunFiles(TrainingObserver):
    """Writes a run's files. If that fails, the problem is reported and the run continues."""

    def __init__(self, run: PreparedRun, outcome: RunOutcome) -> None:
        self._run, self._outcome = run, outcome
        self._checkpoints: list[Path] = []

    def save_finished(self) -> None:
        """Save a finished run; if that fails, the LoRA is still on the node's output."""
        try:
            self._save_lora()
        except StorageError as error:
            self._outcome.saved = False
            self._note(error, f"{error} The LoRA is on the output; connect Save LoRA Weights to save it.")
        else:
            self._save_summary()

    def save_early(self) -> None:
        """Save a run that ended early.

        Raises:
            StorageError: If the LoRA cannot be written.
        """
        self._save_lora()
        self._save_summary()

    def on_step(self, step: StepReport) -> None:
        """Write a checkpoint of the LoRA beside the final file if it is due, and remove the oldest ones."""
        request, final = self._run.request, self._outcome.path
        if not self._run.checkpoints.is_due(step.step) or step.step >= request.steps:
            return
        path = checkpoint_path(final, step.step)
        try:
            self._write_lora(path)
        except StorageError as error:
            self._note(error, str(error))
            return
        self._checkpoints.append(path)
        for old in self._checkpoints[: -request.keep_last]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                self._note(error, f"An old checkpoint cannot be removed: {error}.")
        del self._checkpoints[: -request.keep_last]

    def _save_lora(self) -> None:
        self._outcome.reserved.renew()  # another program may have taken it in the meantime
        self._write_lora(self._outcome.path)

    def _write_lora(self, path: Path) -> None:
        adapters, file_format = self._run.adapters, self._run.request.file_format
        tensors = to_file_tensors(adapters.state_dict(), adapters.scale, file_format, self._run.names.in_diffusers)
        save_lora(tensors, metadata(self._run, self._outcome), path)
        logger.info("BlockSkip: saved %s after step %d", path.name, self._outcome.result.steps)

    def _save_summary(self) -> None:
        """Write the summary beside its LoRA."""
        path = self._outcome.path.with_suffix(".html")
        try:
            write_report(report(self._run, self._outcome), path)
        except (StorageError, OSError) as error:  # OSError: the LoRA that was just written is gone
            self._note(error, str(error))
        else:
            self._outcome.summary_path = path
        self._save_loss_table()
        self._save_likeness()

    def _save_loss_table(self) -> None:
        """Write the loss of every step beside the LoRA, if it is asked for."""
        request, result = self._run.request, self._outcome.result
        if not request.loss_table:
            return
        try:
            write_loss_table(
                result.losses, request.config.accumulation, request.steps, self._outcome.path.with_suffix(".csv")
            )
        except StorageError as error:
            self._note(error, str(error))

    def _save_likeness(self) -> None:
        """Write the likeness of the samples beside the LoRA, if one is known."""
        samples, lora = self._outcome.scored_samples, self._outcome.path
        if all(sample.likeness is None for sample in samples):
            return
        try:
            write_likeness_table(samples, lora.with_name(f"{lora.stem}likeness.csv"))
        except StorageError as error:
            self._note(error, str(error))

    def _note(self, error: Exception, problem: str) -> None:
        logger.error("BlockSkip: %s", error)
        self._outcome.result.problems.append(problem)

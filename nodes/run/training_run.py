"""One training run: settings in, LoRA and figures out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import comfy.model_management
import torch

from ...blockskip_core.accounting.memory_needs import MemoryNeeds
from ...blockskip_core.accounting.plan import MemorySettings, Verdict, changes_that_fit, fits, verdict_on_training
from ...blockskip_core.accounting.plan_text import advice
from ...blockskip_core.accounting.step_estimate import estimated_step_bytes
from ...blockskip_core.adapters.lora import LinearShape, LoraAdapters, LoraSettings
from ...blockskip_core.adapters.lora_formats import LoraFileFormat, to_file_tensors, to_host_lora
from ...blockskip_core.errors import BlockSkipError, CacheError, InvalidInputError, StorageError, TrainingError
from ...blockskip_core.hosts.families.lora_names import file_names
from ...blockskip_core.hosts.files.folders import run_folder
from ...blockskip_core.hosts.files.lora_files import (
    load_lora_file,
    output_path,
    require_writable,
    save_lora,
    unused_path,
)
from ...blockskip_core.hosts.files.start_lora import lora_to_start_from
from ...blockskip_core.hosts.models.counted_run import CountedRun, room_on
from ...blockskip_core.hosts.models.hosted_dit import HostedDit
from ...blockskip_core.hosts.models.identity import model_identity, tensors_identity
from ...blockskip_core.hosts.models.out_of_memory import OutOfMemoryError, is_out_of_memory, let_go
from ...blockskip_core.hosts.models.quantised_blocks import QuantisedDit, formats_on
from ...blockskip_core.hosts.models.residency import evict_others
from ...blockskip_core.hosts.sampling.training_samples import SampleRequest
from ...blockskip_core.model import WeightPlacement
from ...blockskip_core.reporting.run_report import RunReport, write_report
from ...blockskip_core.residuals.sources import ResidualSet
from ...blockskip_core.training.checkpoints import KEPT_RUNS, Checkpoints, RunIdentity, remove_old_runs
from ...blockskip_core.training.config import TrainingConfig
from ...blockskip_core.training.loop import train_lora
from ...blockskip_core.training.result import StepReport, TrainingResult
from ...blockskip_core.units import format_bytes
from ...blockskip_core.version import VERSION
from ..inputs import NO_FILE, require_memory_settings
from ..page.live_chart import LiveChart
from ..page.progress import NodeProgress
from .peak_memory import PeakMemory
from .samples import RunSamples
from .versions import software_versions, version_of

logger = logging.getLogger(__name__)

STEPS_OF_PACE = 20
"""The chart's time per step is the mean of so many of the last steps."""


class TrainingRun:
    """One training run: settings in, LoRA and figures out."""

    def __init__(
        self,
        model: Any,
        residuals: ResidualSet,
        progress: NodeProgress,
        chart: LiveChart,
        start_from: Mapping[str, torch.Tensor] | None,
        samples: SampleRequest | None,
        *,
        rank: int,
        alpha: float = 0.0,
        targets: str = "attention and mlp",
        output_name: str = "loras/blockskip",
        file_format: str = "diffusers",
        activation_budget: float = 0.0,
        kept_weights: str = "resident",
        quantize_kept: str = "off",
        save_every: int = 100,
        keep_last: int = 2,
        start_file: str = NO_FILE,
        resume: bool = True,
        check_memory: bool = True,
        memory_settings: MemorySettings | None = None,
        **training: Any,
    ) -> None:
        self.config = TrainingConfig(activation_budget=activation_budget * 2**30, **training)
        if memory_settings is not None:
            self.config, quantize_kept = _planned(self.config, memory_settings, residuals)
        self.placement: WeightPlacement = "streamed" if _is_streamed(kept_weights) else "as fits"
        self.settings = LoraSettings(rank=rank, alpha=alpha or rank, targets=targets)
        if start_from is None and start_file != NO_FILE:
            start_from = load_lora_file(start_file)
        if file_format not in get_args(LoraFileFormat):
            raise InvalidInputError(
                f"file_format must be one of {', '.join(get_args(LoraFileFormat))}, got {file_format!r}."
            )
        self.residuals, self.progress, self.chart, self.file_format = residuals, progress, chart, file_format
        self.path = output_path(output_name)
        require_writable(self.path)
        self.saved_as: str | None = self.path.name
        self.summary_path: Path | None = None
        _require_same_model(model, residuals)
        self.dit = HostedDit(model, residuals.captions, residuals.latents.shape[1:])
        self.quantize_kept, self.keep_last = quantize_kept, keep_last
        self.trained_dit = self._quantised(quantize_kept)
        self.result = TrainingResult()
        self._resumed_at: int | None = None
        self.memory = PeakMemory(self.dit.device)
        layers = self.dit.lora_layers(residuals.selection, targets)
        shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
        with torch.inference_mode(False):
            self.adapters = LoraAdapters(shapes, self.settings, seed=self.config.seed)
            if start_from is not None:
                self.adapters.load_state_dict(lora_to_start_from(model, start_from, self.adapters))
            self._first_values = self.adapters.state_dict()
        rows = {name: self.adapters.up(name).shape[0] for name in self.adapters.names}
        self.file_names = file_names(model.model, self.dit.adapter, rows, self.file_format)
        if narrow := self.adapters.narrow_layers:
            self.result.problems.append(
                f"rank {rank} is more than {len(narrow)} of {len(rows)} layers can use: they got that of their smaller side, "
                f"{min(narrow.values())} at least."
            )
        identity = self._identity()
        self.checkpoints = Checkpoints(
            run_folder(identity.key), identity, every=save_every, keep=keep_last, resume=resume
        )
        remove_old_runs(run_folder(identity.key).parent, keep=KEPT_RUNS - 1, but=identity.key)
        self.safe_files: list[Path] = []
        self.shown_settings = {
            **asdict(self.config),
            "activation_budget": f"{self.config.activation_budget / 2**30:g} GiB",
            "rank": rank,
            "alpha": self.settings.alpha,
            "targets": targets,
            "output_name": output_name,
            "file_format": file_format,
            "kept_weights": kept_weights,
            "quantize_kept": quantize_kept,
            "save_every": save_every,
            "keep_last": keep_last,
            "resume": resume,
            "samples": "from Sample While Training" if samples is not None else "none",
            "start_from": "another LoRA" if start_from is not None and start_file == NO_FILE else "nothing",
            "start_file": start_file,
            "check_memory": check_memory,
            "memory_settings": "from Memory Plan" if memory_settings is not None else "none",
        }
        self.check_memory = check_memory
        self.samples = samples and RunSamples(
            model,
            samples,
            residuals.selection,
            self.adapters,
            lora_path=self.path,
            last_step=self.config.steps,
            memory=self.memory,
            progress=progress,
            problems=self.result.problems,
        )

    def _identity(self) -> RunIdentity:
        """What decides the LoRA's values after so many steps."""
        no_effect = {"checkpointing", "activation_budget"}
        no_effect.add("warmup_steps" if self.config.lr_schedule == "constant" else "")
        if self.config.lr_schedule not in ("linear", "cosine"):  # their rates depend on how long the run is
            no_effect.add("steps")
        config = {name: value for name, value in asdict(self.config).items() if name not in no_effect}
        return RunIdentity(
            {
                **{f"residuals: {name}": value for name, value in asdict(self.residuals.identity).items()},
                "storage": "on the fly" if self.residuals.storage == "on the fly" else "stored",
                "scale": self.adapters.scale,
                "quantize_kept": self.quantize_kept,
                "targets": self.settings.targets,
                "first values": tensors_identity(self._first_values[name] for name in sorted(self._first_values)),
                "made by": f"BlockSkip {VERSION}",
                **config,
            }
        )

    def train(self) -> None:
        """Train, and save the LoRA however the run ends, if it has learned anything.

        Raises:
            TrainingError: If training cannot go on; the message names the file that holds what was learned.
            StorageError: If a run that ended early cannot be saved.
        """
        try:
            self._train()
        except (TrainingError, OutOfMemoryError) as error:
            if not self.result.steps:
                raise
            self._save_early()
            raise type(error)(f"{error} What was learned so far is saved as {self.path.name}.") from None
        except BaseException:  # Cancel too, and at any moment of the last step
            if self.result.steps:
                self._save_early()
            raise
        finally:
            self.memory.sample()
            if self.result.resumed_at == self.result.steps:
                self._chart_earlier_steps()  # nothing was left to train, or it ended before the first step
        if self.result.overflows:
            self.result.problems.append(
                f"{self.result.overflows} steps were left out because gradients overflowed in float16; a model in bf16 has "
                "no such limit."
            )
        self._save_finished()

    def _save_finished(self) -> None:
        """Save a finished run. If the disk refuses, say so and go on: the LoRA is still on the node's output."""
        try:
            self._save()
        except StorageError as error:
            self.saved_as = None
            logger.error("BlockSkip: %s", error)
            self.result.problems.append(f"{error} The LoRA is on the output; connect Save LoRA Weights to keep it.")
        else:
            self._save_summary()

    def _save_early(self) -> None:
        """Save a run that did not get to its end."""
        self._save()
        self._save_summary()

    def _save_summary(self) -> None:
        """Write the summary beside the LoRA that it is of. If the disk refuses, say so and go on."""
        path = self.path.with_suffix(".html")
        try:
            write_report(self.report(), path)
        except (StorageError, OSError) as error:  # OSError: the LoRA that was written just now is gone
            logger.error("BlockSkip: %s", error)
            self.result.problems.append(str(error))
            return
        self.summary_path = path

    def say_how_it_went(self) -> None:
        """Leave a line under the node: what was trained, and what went wrong on the way."""
        done = f"{self.result.steps} steps"
        if self.result.resumed_at == self.result.steps:
            done = f"This run had finished before: {done}, nothing left to train"
        elif self.result.resumed_at:
            done += f", of which {self.result.resumed_at} by an earlier run that this one went on from"
        saved = f"saved as {self.saved_as}" if self.saved_as else "not saved"
        if self.summary_path:
            saved += f", summary in {self.summary_path.name}"
        self.progress.say(". ".join([f"{done}; {saved}", *dict.fromkeys(self.result.problems)]))

    def _quantised(self, weight_format: str) -> HostedDit | QuantisedDit:
        """Return the model as it is trained on; residuals are those of the model as loaded."""
        if weight_format == "off":
            return self.dit
        kept = [self.dit.blocks[index].name for index in self.residuals.selection.kept]
        return QuantisedDit(self.dit, kept, weight_format)

    def _require_memory(self) -> None:
        """Count the run where a rough upper bound does not fit, and refuse what cannot; say what is slow.

        The bound is twice the rule of thumb of ``estimated_step_bytes``, which tests find to be no less than the count.

        Raises:
            TrainingError: If not even a step without its weights fits, unless `check_memory` is off.
        """
        run, settings = self._counted_run()
        available, place = room_on(self.dit.device)
        on_cpu = self.dit.device.type == "cpu"  # the weights are in that memory already
        resident = 0 if on_cpu or self.placement == "streamed" else run.trained_weights(settings)
        if self.samples:
            self.samples.training_peak = resident + self._estimated_bytes()
        if self._has_finished():
            return
        if fits(resident + 2 * self._estimated_bytes(), available):
            self._keep_resident()
            return
        self.progress("counting memory", 1, 2)
        try:
            verdict = self._verdict(run, settings, available, place)
        except BlockSkipError:
            raise
        except Exception as error:  # layers of other packs may not let themselves be counted, and yet be trained
            logger.exception("BlockSkip: memory could not be counted")
            self.result.problems.append(
                f"Whether this run fits could not be counted ({type(error).__name__}: {error}). It was started."
            )
            return
        if self.check_memory and not verdict.starts:
            raise TrainingError(f"{verdict.problem} Or switch `check_memory` off to try it all the same.")
        if verdict.problem:
            logger.warning("BlockSkip: %s", verdict.problem)
            self.result.problems.append(verdict.problem)
        else:
            self._keep_resident()

    def _keep_resident(self) -> None:
        """Load all weights, as they fit by count; left alone, the host would stream some to keep its own reserve free."""
        if self.placement == "as fits":
            self.placement = "resident"

    def _verdict(self, run: CountedRun, settings: MemorySettings, available: int, place: str) -> Verdict:
        """Count the training, and what would help if it does not fit."""
        on_cpu = self.dit.device.type == "cpu"

        def count(settings: MemorySettings) -> MemoryNeeds:
            needs = run.needs(settings).without_weights() if on_cpu else run.needs(settings)
            return replace(needs, precomputing=None) if settings.storage == "disk" else needs  # that is done

        counted, block = count(settings).training, 0 if on_cpu else run.largest_trained_block(settings)
        verdict = verdict_on_training(counted.peak, counted.weights, block, available, place)
        if not verdict.problem or (
            verdict.starts and self.placement == "streamed"
        ):  # moving weights is what streaming is
            return Verdict(True)
        problem = (
            f"{verdict.problem} {advice(changes_that_fit(settings, available, count, formats_on(self.dit.device)))}"
        )
        if self.shown_settings["memory_settings"] != "none":
            problem += " Some of these are set at Memory Plan."
        return replace(verdict, problem=problem)

    def _has_finished(self) -> bool:
        """Whether an earlier run has done all steps."""
        state = self.checkpoints.newest(self.config.steps)
        return state is not None and state.step >= self.config.steps

    def _counted_run(self) -> tuple[CountedRun, MemorySettings]:
        residuals = self.residuals
        run = CountedRun(
            self.dit,
            residuals.selection,
            self.settings,
            captions=len(residuals.captions),
            draws=len(residuals.schedule),
            chunk_size=residuals.chunk_size,
            linear=residuals.back_residual == "linear",
            residual_format=residuals.identity.residual_format,
        )
        settings = MemorySettings(
            config=self.config,
            storage=residuals.storage,
            quantize_kept=self.quantize_kept,
            patch_min=residuals.schedule.patches.patch_min,
        )
        return run, settings

    def _train(self) -> None:
        self._require_memory()
        evict_others(self.dit.patcher)
        self.memory.restart()  # text encoder and VAE are no part of the run's peak
        if self.trained_dit is not self.dit:
            self.trained_dit.quantise(lambda done, total: self.progress("layers quantised", done, total))
        try:
            self._run_loop()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = let_go(error)
        else:
            return
        self._train_streamed_after(said)

    def _train_streamed_after(self, said: str) -> None:
        """Continue a run that ran out of memory, with its weights streamed, from its last checkpoint.

        Raises:
            OutOfMemoryError: If they were streamed already, there are none to stream, or it happens again.
        """
        advice = (
            "Lower `patch_min` or `batch_size`, set `activation_budget` to 0, or skip more blocks at Select Blocks; Memory "
            "Plan shows what fits."
        )
        failed = f"Training ran out of memory after step {self.result.steps} ({said})."
        if self.placement == "streamed" or self.dit.device.type == "cpu":
            raise OutOfMemoryError(f"{failed} {advice}")
        problem = f"{failed} It continued with its weights streamed, which is slower. {advice}"
        logger.warning("BlockSkip: %s", problem)
        self.result.problems.append(problem)
        self.placement = "streamed"
        self._resumed_at = self.result.resumed_at  # what is taken up now is this run's own
        self.adapters.load_state_dict(self._first_values)
        self.result.steps = 0
        self.result.losses.clear()
        self.checkpoints.resume = True
        comfy.model_management.soft_empty_cache()
        try:
            self._run_loop()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = let_go(error)
        else:
            return
        raise OutOfMemoryError(f"Training ran out of memory even with its weights streamed ({said}). {advice}")

    def _run_loop(self) -> None:
        train_lora(
            self.trained_dit,
            self.residuals.schedule,
            self.residuals.latents,
            self.residuals.selection,
            self.residuals.source(self.dit, self.progress),
            self.adapters,
            self.config,
            result=self.result,
            on_step=self._on_step,
            activation_bytes=self._estimated_bytes(),
            weights=self.placement,
            checkpoints=self.checkpoints,
            interlude=self.samples,
        )

    def _estimated_bytes(self) -> int:
        """Return about what a step takes beside the weights."""
        text = max(self.dit.text_tokens(caption) for caption in range(len(self.residuals.captions)))
        estimated = estimated_step_bytes(
            num_kept=len(self.residuals.selection.kept),
            tokens=self.dit.image_tokens(*self.residuals.latents.shape[-2:]) + text,
            width=self.dit.width,
            itemsize=self.dit.dtype.itemsize,
            batch_size=self.config.batch_size,
            checkpointing=self.config.checkpointing,
            lora_numbers=self.adapters.num_parameters,
        )
        return estimated + round(self.config.activation_budget) * self.config.checkpointing

    def _on_step(self, report: StepReport) -> None:
        if self._resumed_at is not None:
            self.result.resumed_at = self._resumed_at
        self.memory.sample()
        pace = sum(self.result.step_seconds) / len(self.result.step_seconds)
        left = timedelta(seconds=round(pace * (self.config.steps - report.step)))
        self._chart(report, left)
        detail = f"loss {report.loss:.4f} · {pace:.2f} s/step · {left} left · peak {format_bytes(self.memory.peak)}"
        if self.checkpoints.is_due(report.step) and report.step < self.config.steps:
            self._save_safe_file(report.step)
        self.progress("training step", report.step, self.config.steps, detail)

    def _chart(self, report: StepReport, left: timedelta) -> None:
        if report.step == self.result.resumed_at + 1:
            self._chart_earlier_steps()
        self.chart.step(
            report.step,
            self.config.steps,
            report.loss,
            report.learning_rate,
            seconds_per_step=_mean(self.result.step_seconds[-STEPS_OF_PACE:]),
            seconds_left=left.total_seconds(),
            memory_now=self.memory.now,
            memory_peak=self.memory.peak,
            memory_of=self.memory.what,
        )

    def _chart_earlier_steps(self) -> None:
        size = self.config.accumulation
        ends = range(size, self.result.resumed_at * size + 1, size)
        self.chart.earlier([sum(self.result.losses[end - size : end]) / size for end in ends], self.config.steps)

    def _save_safe_file(self, step: int) -> None:
        """Write the LoRA so far beside the final file. If the disk refuses, say so and go on."""
        path = self.path.with_name(f"{self.path.stem}step{step:06}.safetensors")
        try:
            self._save(path)
        except StorageError as error:
            logger.error("BlockSkip: %s", error)
            self.result.problems.append(str(error))
            return
        self.safe_files.append(path)
        for old in self.safe_files[: -self.keep_last]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                logger.error("BlockSkip: %s", error)
                self.result.problems.append(f"An old safe point cannot be removed: {error}.")
        del self.safe_files[: -self.keep_last]

    def _save(self, path: Path | None = None) -> None:
        if path is None:  # another program may have taken the name since
            path = self.path = unused_path(self.path)
            self.saved_as = path.name
        state = self.adapters.state_dict()
        tensors = to_file_tensors(state, self.adapters.scale, self.file_format, self.file_names.in_diffusers)
        save_lora(tensors, self.metadata(), path)
        logger.info("BlockSkip: saved %s after step %d", path.name, self.result.steps)

    @torch.inference_mode(False)  # the tensors are ordinary ones, as core's are
    def host_lora(self) -> dict[str, torch.Tensor]:
        """Return the LoRA as core's trainer would."""
        return to_host_lora(self.adapters.state_dict(), self.adapters.scale)

    def loss_map(self) -> dict[str, list[float]]:
        """Return the losses for core's Plot Loss Graph."""
        return {"loss": self.result.losses}

    def metadata(self) -> dict[str, Any]:
        """Return what the file says of itself."""
        selection, patches = self.residuals.selection, self.residuals.schedule.patches
        return {
            "trained_with": f"BlockSkip {VERSION}",
            "base_model": self.dit.adapter.title,
            "base_model_identity": self.residuals.identity.model,
            "base_model_version": self.dit.adapter.base_model_version,
            "architecture": self.dit.adapter.architecture,
            "file_format": self.file_format,
            "loads_in": self.file_names.loads_in,
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "targets": self.settings.targets,
            "skipped_first": selection.front,
            "skipped_last": selection.back,
            "blocks": selection.num_blocks,
            "selection_method": selection.method,
            "patch_min": patches.patch_min,
            "patch_max": patches.patch_max,
            "patch_order": patches.order,
            "timesteps": self.residuals.schedule.timesteps,
            "residuals": self.residuals.storage,
            "back_residual": self.residuals.back_residual,
            "residual_format": self.residuals.identity.residual_format,
            "steps": self.result.steps,
            "steps_planned": self.config.steps,
            "batch_size": self.config.batch_size,
            "accumulation": self.config.accumulation,
            "learning_rate": self.config.learning_rate,
            "quantize_kept": self.quantize_kept,
            "seed": self.config.seed,
            "draws_seed": self.residuals.schedule.seed,
            "peft_version": version_of("peft"),
        }

    def summary(self) -> dict[str, Any]:
        """Return figures of the run, all finite, for the node's display and the history."""
        selection = self.residuals.selection
        kept = [self.trained_dit.blocks[index] for index in selection.kept]
        seconds = self.result.step_seconds
        tenth = max(1, len(self.result.losses) // 10)
        return {
            "file": self.saved_as,
            "summary_file": self.summary_path and self.summary_path.name,
            "quantize_kept": self.quantize_kept,
            "blocks": selection.num_blocks,
            "skipped_first": selection.front,
            "skipped_last": selection.back,
            "kept_blocks": len(kept),
            "kept_parameters": sum(block.num_parameters for block in kept),
            "kept_weights_bytes": sum(block.num_bytes for block in kept),
            "all_parameters": sum(block.num_parameters for block in self.dit.blocks),
            "all_weights_bytes": sum(block.num_bytes for block in self.dit.blocks),
            "saved_for_backward_bytes": self.result.saved_bytes,
            "lora_parameters": self.adapters.num_parameters,
            "peak_memory_bytes": self.memory.peak,
            "peak_memory_of": self.memory.what,
            "seconds_per_step": _mean(seconds),
            "steps": self.result.steps,
            "loss_of_first_tenth": _mean(self.result.losses[:tenth]),
            "loss_of_last_tenth": _mean(self.result.losses[-tenth:]),
            "self_check": self.result.self_check,
            "resumed_at": self.result.resumed_at,
            "problems": list(dict.fromkeys(self.result.problems)),
        }

    def report(self) -> RunReport:
        """Return everything that the summary file says; the LoRA's file is there."""
        said = self.summary()
        return RunReport(
            file=self.path.name,
            file_bytes=self.path.stat().st_size,
            family=self.dit.adapter.title,
            selection=self.residuals.selection,
            block_names=[block.name for block in self.dit.blocks],
            schedule=self.residuals.schedule,
            num_captions=len(self.residuals.captions),
            storage={
                "Residuals": self.residuals.storage,
                "Stored as": self.residuals.identity.residual_format,
                "Back residual": self.residuals.back_residual,
            },
            settings=self.shown_settings,
            config=self.config,
            result=self.result,
            peak_bytes=self.memory.peak,
            peak_of=self.memory.what,
            kept_parameters=said["kept_parameters"],
            all_parameters=said["all_parameters"],
            kept_bytes=said["kept_weights_bytes"],
            all_bytes=said["all_weights_bytes"],
            lora_parameters=said["lora_parameters"],
            versions=software_versions(self.dit.device),
            written=datetime.now().astimezone().isoformat(" ", "minutes"),
            samples=self.samples.for_report() if self.samples else (),
        )


def _require_same_model(model: Any, residuals: ResidualSet) -> None:
    if model_identity(model) != residuals.identity.model:
        raise CacheError(
            "The residuals were computed from another model than the one connected here. Connect the same MODEL "
            "to Precompute Residuals and to Dynamic Patch Trainer."
        )


def _planned(config: TrainingConfig, settings: MemorySettings, residuals: ResidualSet) -> tuple[TrainingConfig, str]:
    """Return the settings that Memory Plan gave: the config, and the format of the kept weights.

    Raises:
        InvalidInputError: If the residuals were made with other settings than the plan counted.
    """
    require_memory_settings(settings)
    made = (residuals.schedule.patches.patch_min, residuals.storage == "on the fly")
    if made != (settings.patch_min, settings.storage == "on the fly"):
        raise InvalidInputError(
            f"Memory Plan counted crops of {settings.patch_min} px with storage {settings.storage}; the residuals have "
            f"{made[0]} px and {residuals.storage}. Connect its `settings` to Precompute Residuals too."
        )
    planned = settings.config
    config = replace(
        config,
        batch_size=planned.batch_size,
        accumulation=config.accumulation * planned.accumulation,
        checkpointing=planned.checkpointing,
        activation_budget=planned.activation_budget,
    )
    return config, settings.quantize_kept


def _is_streamed(kept_weights: str) -> bool:
    if kept_weights not in ("resident", "streamed"):
        raise InvalidInputError(f"kept_weights must be resident or streamed, got {kept_weights!r}.")
    return kept_weights == "streamed"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

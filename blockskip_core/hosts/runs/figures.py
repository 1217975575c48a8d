"""The facts about a run for the LoRA's metadata, the node, the summary, and the line under the node.

Each fact is stated once, in :func:`facts`; the other functions pick from them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ...reporting.likeness_table import likeness_by_step, likeness_in_words
from ...reporting.run_report import RunReport
from ...version import VERSION
from .outcome import RunOutcome
from .prepare import PreparedRun
from .versions import software_versions, version_of

IN_METADATA = (
    "trained_with", "base_model", "base_model_identity", "base_model_version", "architecture", "file_format", "loads_in",
    "rank", "alpha", "targets", "skipped_first", "skipped_last", "frozen_last", "kept_last", "blocks", "selection_method",
    "patch_min",
    "patch_max", "patch_order", "timesteps", "residuals", "back_residual",
    "residual_format", "steps", "steps_planned", "batch_size", "accumulation", "learning_rate", "quantize_kept", "seed",
    "draws_seed", "peft_version",
)  # fmt: skip
IN_METADATA_IF_USED = ("ema", "dropped_captions", "correct_4bit")
ON_NODE = (
    "file", "summary_file", "quantize_kept", "blocks", "skipped_first", "skipped_last", "frozen_last", "kept_last", "kept_blocks",
    "kept_parameters",
    "kept_weights_bytes", "all_parameters", "all_weights_bytes", "saved_for_backward_bytes", "lora_parameters",
    "peak_memory_bytes", "peak_memory_of", "seconds_per_step", "steps", "loss_of_first_tenth", "loss_of_last_tenth",
    "self_check", "resumed_at", "problems",
)  # fmt: skip


def facts(run: PreparedRun, outcome: RunOutcome) -> dict[str, Any]:
    """Return every fact of a run by its name: settings, model, training examples and results."""
    return {
        **run.request.shown(),
        "correct_4bit": run.corrected,
        "steps_planned": run.request.steps,
        **_model_facts(run),
        **_example_facts(run),
        **_training_facts(outcome),
        "trained_with": f"BlockSkip {VERSION}",
        "peft_version": version_of("peft"),
    }


def metadata(run: PreparedRun, outcome: RunOutcome) -> dict[str, Any]:
    """Return the metadata of the LoRA's file."""
    known = facts(run, outcome)
    return _chosen(known, [*IN_METADATA, *(name for name in IN_METADATA_IF_USED if known[name])])


def on_node(run: PreparedRun, outcome: RunOutcome) -> dict[str, Any]:
    """Return figures of the run, all finite, for the node's display and the history."""
    return _chosen(facts(run, outcome), ON_NODE)


def report(run: PreparedRun, outcome: RunOutcome) -> RunReport:
    """Return the content of the summary; the LoRA's file must exist."""
    known, residuals = facts(run, outcome), run.residuals
    return RunReport(
        file=outcome.path.name,
        file_bytes=outcome.path.stat().st_size,
        family=known["base_model"],
        selection=run.residuals.selection,
        block_names=[block.name for block in run.dit.blocks],
        schedule=run.residuals.schedule,
        num_captions=run.dit.num_texts,
        storage={
            "Residuals": known["residuals"],
            "Stored as": known["residual_format"],
            "Back residual": known["back_residual"],
            **({"Dropped captions": residuals.on_dropped} if residuals.dropped else {}),
        },
        settings={**run.request.shown(), "correct_4bit": run.corrected},
        config=run.request.config,
        result=outcome.result,
        peak_bytes=known["peak_memory_bytes"],
        peak_of=known["peak_memory_of"],
        kept_parameters=known["kept_parameters"],
        all_parameters=known["all_parameters"],
        kept_bytes=known["kept_weights_bytes"],
        all_bytes=known["all_weights_bytes"],
        lora_parameters=known["lora_parameters"],
        versions=software_versions(run.dit.device),
        written=datetime.now().astimezone().isoformat(" ", "minutes"),
        samples=[sample.small for sample in outcome.samples],
        likeness=likeness_in_words(likeness_by_step(outcome.scored_samples), _saved_steps(outcome)),
    )


def checkpoint_path(lora: Path, step: int) -> Path:
    """Return the file of a LoRA's checkpoint after ``step`` steps."""
    return lora.with_name(f"{lora.stem}step{step:06}.safetensors")


def _saved_steps(outcome: RunOutcome) -> dict[int, str]:
    """Return the LoRA's file of every sampled step that has one."""
    # A run that resumes has another name for its LoRA than the run that made the earlier samples.
    loras = {sample.step: sample.path.name.partition(f"step{sample.step:06}_")[0] for sample in outcome.samples}
    files = {step: checkpoint_path(outcome.path.with_name(f"{lora}.safetensors"), step) for step, lora in loras.items()}
    kept = {step: path.name for step, path in files.items() if path.is_file()}
    return {**kept, outcome.result.steps: outcome.path.name}


def outcome_line(outcome: RunOutcome) -> str:
    """Return the line that stays under the node: what was trained, and any problems."""
    result = outcome.result
    done = f"{result.steps} steps"
    if result.resumed_at == result.steps:
        done = f"This run was already finished: {done}, nothing left to train"
    elif result.resumed_at:
        done += f", {result.resumed_at} of them by the earlier run that this one resumed"
    saved = f"saved as {outcome.path.name}" if outcome.saved else "not saved"
    if outcome.summary_path:
        saved += f", summary in {outcome.summary_path.name}"
    return ". ".join([f"{done}; {saved}", *outcome.problems])


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None for no values."""
    return sum(values) / len(values) if values else None


def _chosen(known: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: known[name] for name in names}


def _model_facts(run: PreparedRun) -> dict[str, Any]:
    selection, blocks = run.residuals.selection, run.dit.blocks
    kept = [run.trained_dit.blocks[index] for index in selection.kept]
    return {
        "base_model": run.dit.adapter.title,
        "base_model_identity": run.residuals.identity.model,
        "base_model_version": run.dit.adapter.base_model_version,
        "architecture": run.dit.adapter.architecture,
        "loads_in": run.names.loads_in,
        "blocks": selection.num_blocks,
        "skipped_first": selection.front,
        "skipped_last": selection.back,
        "frozen_last": selection.frozen,
        "kept_last": selection.tail,
        "selection_method": selection.method,
        "kept_blocks": len(kept),
        "kept_parameters": sum(block.num_parameters for block in kept),
        "kept_weights_bytes": sum(block.num_bytes for block in kept),
        "all_parameters": sum(block.num_parameters for block in blocks),
        "all_weights_bytes": sum(block.num_bytes for block in blocks),
        "lora_parameters": run.adapters.num_parameters,
    }


def _example_facts(run: PreparedRun) -> dict[str, Any]:
    residuals, schedule = run.residuals, run.residuals.schedule
    return {
        "patch_min": schedule.patches.patch_min,
        "patch_max": schedule.patches.patch_max,
        "patch_order": schedule.patches.order,
        "timesteps": schedule.timesteps,
        "draws_seed": schedule.seed,
        "residuals": residuals.storage,
        "back_residual": residuals.back_residual,
        "residual_format": residuals.identity.residual_format,
        "dropped_captions": residuals.dropped,
    }


def _training_facts(outcome: RunOutcome) -> dict[str, Any]:
    result = outcome.result
    tenth = max(1, len(result.losses) // 10)
    return {
        "file": outcome.path.name if outcome.saved else None,
        "summary_file": outcome.summary_path and outcome.summary_path.name,
        "steps": result.steps,
        "resumed_at": result.resumed_at,
        "seconds_per_step": mean(result.step_seconds),
        "loss_of_first_tenth": mean(result.losses[:tenth]),
        "loss_of_last_tenth": mean(result.losses[-tenth:]),
        "saved_for_backward_bytes": result.saved_bytes,
        "self_check": result.self_check,
        "peak_memory_bytes": outcome.memory.peak,
        "peak_memory_of": outcome.memory.what,
        "problems": outcome.problems,
    }

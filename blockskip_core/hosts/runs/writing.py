"""A trainer's request as a run file, with everything that another machine needs except the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InvalidInputError
from ...residuals.residual_set import ResidualSet
from ...runs.packing import Material, write_material
from ...runs.run_file import ResidualRecipe, RunFile
from ..files.lora_files import NO_FILE, ReservedName, load_lora_file, output_path
from ..models.model_file import ModelFile, model_file_of
from .prepare import prepare
from .request import CONNECTED, RunRequest
from .shown_command import command_for

HOST = "comfyui"


@dataclass(frozen=True)
class WrittenRun:
    """A run file on the disk.

    Attributes:
        path: The run file; what it refers to is beside it.
        command: The command that trains it in one process.
    """

    path: Path
    command: str


def write_run(model: Any, residuals: ResidualSet, request: RunRequest, name: str) -> WrittenRun:
    """Check a request as the trainer does, and write it down.

    Args:
        model: The MODEL, as its loader gives it.
        residuals: What replaces the skipped blocks.
        request: The trainer's request.
        name: Name of the run file below the output folder, without ending; a number is appended.

    Raises:
        BlockSkipError: If the run could not start, cannot be written down, or the disk cannot be written.
    """
    file = model_file_of(model)
    _require_no_pictures(request)
    request = request.planned_for(residuals)
    request = replace(request, memory_settings=None)
    prepare(model, residuals, request)  # whatever the run would refuse is refused now
    material = Material(residuals.latents, residuals.captions, _start(request))
    with ReservedName(output_path(name)) as reserved:
        beside = reserved.path
        try:
            path = _written(beside, file, residuals, request, material)
        except BaseException:
            beside.unlink(missing_ok=True)  # alone it is of no use
            raise
    return WrittenRun(path, command_for(path, file))


def _written(beside: Path, file: ModelFile, residuals: ResidualSet, request: RunRequest, material: Material) -> Path:
    """Write the material and, beside it, the run file; return the latter."""
    path = beside.with_suffix(".json")
    run = RunFile(
        host=HOST,
        model=file.arguments(),
        settings={each.name: getattr(request, each.name) for each in fields(RunRequest) if each.name not in CONNECTED},
        schedule=residuals.schedule,
        selection=residuals.selection,
        identity=residuals.identity,
        residuals=ResidualRecipe(
            storage=residuals.storage,
            chunk_size=residuals.chunk_size,
            family=residuals.family,
            back_residual=residuals.back_residual,
            remarks=tuple(residuals.remarks),
            dropped=residuals.dropped,
        ),
        material=beside.name,
        material_hash=write_material(material, beside),
    )
    run.write(path)
    return path


def _require_no_pictures(request: RunRequest) -> None:
    if request.samples is not None:
        raise InvalidInputError("A run outside ComfyUI makes no pictures. Disconnect `samples`.")


def _start(request: RunRequest) -> Mapping[str, Tensor]:
    """Return the LoRA to train further, or nothing."""
    if request.start_from is not None:
        return request.start_from
    return {} if request.start_file == NO_FILE else load_lora_file(request.start_file)

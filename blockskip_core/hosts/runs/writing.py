"""A trainer's request as a run file, with everything that another machine needs except the model."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from torch import Tensor

from ...errors import InvalidInputError
from ...residuals.residual_set import ResidualSet
from ...runs.packing import Material, write_material
from ...runs.run_file import ResidualRecipe, RunFile
from ..files.lora_files import NO_FILE, ReservedName, load_lora_file, output_path
from ..models.model_file import ModelFile, model_file_of
from .prepare import prepare
from .request import CONNECTED, RunRequest

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


def command_for(path: Path, file: ModelFile) -> str:
    """Return the command that trains a run file in one process, on this machine, from the pack's folder."""
    comfyui = Path(folder_paths.__file__).parent
    output = Path(folder_paths.get_output_directory())
    arguments = [
        sys.executable or "python", "-m", "blockskip_core.train", str(path), "--comfyui", str(comfyui), *_folders(file),
        "--output", str(output), *(["--", "--cpu"] if args.cpu else []),
    ]  # fmt: skip
    return (
        shlex.join(arguments)
        if os.name != "nt"
        else " ".join(f'"{each}"' if " " in each else each for each in arguments)
    )


def _folders(file: ModelFile) -> list[str]:
    """Return the options that let the command read the model: a link's target may be in another folder."""
    folder = Path(file.folder)
    there = (folder / file.file).resolve()
    beyond = [] if there.is_relative_to(folder.resolve()) else ["--models", str(there.parent)]
    return ["--models", str(folder), *beyond]


def _require_no_pictures(request: RunRequest) -> None:
    if request.samples is not None:
        raise InvalidInputError("A run outside ComfyUI makes no pictures. Disconnect `samples`.")


def _start(request: RunRequest) -> Mapping[str, Tensor]:
    """Return the LoRA to train further, or nothing."""
    if request.start_from is not None:
        return request.start_from
    return {} if request.start_file == NO_FILE else load_lora_file(request.start_file)

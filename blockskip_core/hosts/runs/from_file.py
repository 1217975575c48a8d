"""ComfyUI as the host of a run file: see ``runs.host``. Nothing here imports ComfyUI before :func:`start` has found it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.latents import largest_shape
from ...errors import CacheError, InvalidInputError
from ...runs.host import Places
from ...runs.own_residuals import kept_apart
from ...runs.packing import Material
from ...runs.run_file import RunFile
from ...runs.typed import from_json
from ...training.together import Together

if TYPE_CHECKING:
    from ...residuals.residual_set import ResidualSet
    from .prepare import PreparedRun
    from .request import RunRequest
    from .view import RunProgress

logger = logging.getLogger(__name__)


def start(places: Places, arguments: Sequence[str]) -> None:
    """Put ComfyUI on the path, let it read its own arguments, and have it write where the user wants.

    Raises:
        InvalidInputError: If the folder is not a ComfyUI, or the output folder does not exist.
    """
    folder = places.program
    if folder is None or not (folder / "comfyui_version.py").is_file():
        raise InvalidInputError(f"--comfyui must be ComfyUI's folder, with its comfyui_version.py, got {folder}.")
    if not places.output.is_dir():
        raise InvalidInputError(f"--output must be a folder that exists, got {places.output}.")
    sys.path.insert(0, str(folder.resolve()))
    _read_arguments(arguments)
    import folder_paths

    folder_paths.set_output_directory(str(places.output.resolve()))


def _read_arguments(arguments: Sequence[str]) -> None:
    """Let ComfyUI parse these instead of this program's arguments; it does so when it is imported, and exits on errors."""
    import comfy.options

    ours = sys.argv
    comfy.options.enable_args_parsing()
    try:
        sys.argv = [ours[0], *arguments]
        import comfy.cli_args
    finally:
        sys.argv = ours


def prepare(run: RunFile, places: Places, progress: RunProgress, together: Together) -> OutsideRun:
    """Load model and material, and check that the run is the one that was written.

    Raises:
        BlockSkipError: If something is missing, changed, or does not fit.
    """
    _take_own_gpu(together)
    material = run.read_material(places.data.file(run.material))
    model = _model(run, places)
    prepared = _prepared(run, material, model, progress)
    prepared.request.config.micro_batches.share_of(together.rank, together.size)  # refused now rather than in training
    return OutsideRun(prepared, progress, together)


def _take_own_gpu(together: Together) -> None:
    from comfy.cli_args import args

    from .own_gpu import take_own_gpu

    if not args.cpu:
        take_own_gpu(together.local_rank, together.size, args.cuda_device)


def _model(run: RunFile, places: Places) -> Any:
    from ..models.identity import model_identity
    from ..models.model_file import ModelFile

    file = from_json(ModelFile, run.model, "model", without=["folder"])
    model = file.load(places.models.file(file.file))
    if model_identity(model) != run.identity.model:
        raise CacheError(
            f"{file.file} is not the model that this run was written for: its weights differ, or this device keeps them in "
            "another dtype. Use the same file, a device of the same kind and, after --, the flags that ComfyUI had when it was "
            "written (such as --bf16-unet), or write the run again."
        )
    return model


def _prepared(run: RunFile, material: Material, model: Any, progress: RunProgress) -> PreparedRun:
    from ..inputs.conditioning import flatten_conditionings
    from ..models.hosted_dit import HostedDit
    from .prepare import prepare as prepare_run

    flatten_conditionings(material.captions, with_references=True)  # they may be anything
    dit = HostedDit(model, material.captions, largest_shape(material.latents))
    residuals = kept_apart(_residuals(run, material, str(dit.dtype)), run.material_hash, progress)
    return prepare_run(model, residuals, _request(run.settings, material))


def _residuals(run: RunFile, material: Material, dtype: str) -> ResidualSet:
    """Return the residuals as this machine makes them."""
    from ..files.folders import residuals_folder
    from ..models.identity import captions_identity, host_identity

    if captions_identity(material.captions) != run.identity.captions:
        raise CacheError(f"{run.material} has other captions than the run file says. Write both again.")
    identity = replace(run.identity, host=host_identity(), dtype=dtype)
    if identity != run.identity:
        logger.warning(
            "The run was written with %s in %s, and this is %s in %s: its residuals are computed again, and the LoRA may "
            "differ in rounding.", run.identity.host, run.identity.dtype, identity.host, dtype,
        )  # fmt: skip
    return run.residual_set(material, identity, residuals_folder(identity.key))


def _request(settings: Mapping[str, Any], material: Material) -> RunRequest:
    from .request import CONNECTED, RunRequest

    start_from = dict(material.start) or None
    return from_json(RunRequest, settings, "settings", without=CONNECTED, start_from=start_from)


class OutsideRun:
    """A run that ComfyUI can start; see ``runs.host.ReadyRun``."""

    def __init__(self, prepared: PreparedRun, progress: RunProgress, together: Together) -> None:
        self._run, self._progress, self._together = prepared, progress, together

    @property
    def agreed(self) -> Mapping[str, object]:
        """What the run is, its length, and where its residuals are kept."""
        length, folder = self._run.request.steps, self._run.residuals.folder.name
        return {**self._run.identity.parts, "number of steps": length, "folder of residuals": folder}

    def train(self) -> None:
        """Train in this process; process 0 writes."""
        from .console_view import ConsoleView
        from .training import carry_out, help_along

        view = ConsoleView(self._progress)
        if self._together.rank == 0:
            outcome = carry_out(self._run, self._progress, view, self._together)
            self._progress.say(f"The LoRA is {Path(outcome.path)}.")
        else:
            help_along(self._run, self._progress, view, self._together)

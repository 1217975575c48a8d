"""diffusers as the host of a run file: see ``runs.host``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ...adapters.lora import LinearShape, LoraAdapters, LoraSettings
from ...api import Lora
from ...data.latents import as_tensors
from ...errors import CacheError, InvalidInputError, StorageError
from ...model import linear_names
from ...residuals.content_hash import tensors_identity
from ...residuals.residual_set import ResidualSet
from ...residuals.sources import source_of
from ...runs.host import Places, Shown
from ...runs.packing import Material
from ...runs.run_file import RunFile
from ...runs.typed import from_json
from ...training.checkpoints import KEPT_RUNS, Checkpoints, RunIdentity, remove_old_runs
from ...training.config import TrainingConfig
from ...training.loop import train_lora
from ...training.observer import OnStep
from ...training.result import TrainingResult
from ...training.shared_residuals import write_cache_together
from ...training.together import Together
from ...version import VERSION
from .diffusers_dit import DiffusersDit
from .loading import INDEX, load_transformer
from .lora_files import save_lora
from .output_file import OutputFile
from .run_files import ModelFolder, RunFiles, captions_identity, software, transformer_identity

logger = logging.getLogger(__name__)


class DiffusersHost:
    """The host; it remembers the device between the two calls."""

    def __init__(self) -> None:
        self._device = ""

    def start(self, places: Places, arguments: Sequence[str]) -> None:
        """Read the host's own arguments: nothing, or ``--device NAME``.

        Raises:
            InvalidInputError: If they are others, or the output folder does not exist.
        """
        if not places.output.is_dir():
            raise InvalidInputError(f"--output must be a folder that exists, got {places.output}.")
        if arguments and (len(arguments) != 2 or arguments[0] != "--device"):
            raise InvalidInputError(
                f"diffusers takes --device NAME after --, such as --device cuda:1, got {' '.join(arguments)}."
            )
        self._device = arguments[1] if arguments else ""

    def prepare(self, run: RunFile, places: Places, progress: Shown, together: Together) -> FileRun:
        """Load transformer and material, and check that the run is the one that was written.

        Raises:
            BlockSkipError: If something is missing, changed, or does not fit, or the LoRA could not be written.
        """
        material = run.read_material(places.data.file(run.material))
        parts = dict(run.settings)
        config = from_json(TrainingConfig, parts.pop("training", None), "training in settings")
        lora = from_json(LoraSettings, parts.pop("lora", None), "lora in settings")
        files = from_json(RunFiles, parts.pop("files", None), "files in settings")
        if parts:
            raise InvalidInputError(
                f"settings has {', '.join(sorted(parts))}, which this version does not know. Remove it."
            )
        config.micro_batches.share_of(together.rank, together.size)  # refused now rather than in training
        dit = _loaded(run, material, places, self._device or _device_of(together.rank))
        return FileRun(
            _Parts(run, _residuals(run, material, places, dit), dit, config, lora, files, places.output),
            progress,
            together,
        )


def _device_of(rank: int) -> str:
    """Return the device of a process: the next GPU for each, if there are any."""
    count = torch.cuda.device_count()
    return f"cuda:{rank % count}" if count else "cpu"


def _loaded(run: RunFile, material: Material, places: Places, device: str) -> DiffusersDit:
    model = from_json(ModelFolder, run.model, "model")
    folder = places.models.folder_with(model.folder, INDEX, model.component)
    transformer = load_transformer(folder, dtype=getattr(torch, model.dtype), component=model.component)
    if transformer_identity(transformer) != run.identity.model:
        raise CacheError(
            f"{model.folder} is not the model that this run was written for: its weights differ. Use the same folder, or write "
            "the run again."
        )
    return DiffusersDit(transformer, material.captions, device=device)


def _residuals(run: RunFile, material: Material, places: Places, dit: DiffusersDit) -> ResidualSet:
    run.selection.require_for(len(dit.blocks), dit.family)
    if captions_identity(material.captions) != run.identity.captions:
        raise CacheError(f"{run.material} has other captions than the run file says. Write both again.")
    if tensors_identity(as_tensors(material.latents)) != run.identity.pictures:
        raise CacheError(f"{run.material} has other latents than the run file says. Write both again.")
    identity = replace(run.identity, host=software())
    if identity != run.identity:
        logger.warning(
            "The run was written with %s, and this is %s: its residuals are computed again, and the LoRA may differ in "
            "rounding.", run.identity.host, identity.host,
        )  # fmt: skip
    return run.residual_set(material, identity, places.output / "blockskip" / "residuals" / identity.key)


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    run: RunFile
    residuals: ResidualSet
    dit: DiffusersDit
    config: TrainingConfig
    lora: LoraSettings
    files: RunFiles
    output: Path


class FileRun:
    """A run that diffusers can start; see ``runs.host.ReadyRun``."""

    def __init__(self, parts: _Parts, progress: Shown, together: Together) -> None:
        self._parts, self._progress, self._together = parts, progress, together
        self._adapters = _new_adapters(parts)
        self._identity = _identity(parts, self._adapters)
        self._file = OutputFile(parts.output, parts.files.output_name) if together.rank == 0 else None

    @property
    def agreed(self) -> Mapping[str, object]:
        """What the run is, and its length."""
        return {**self._identity.parts, "number of steps": self._parts.config.steps}

    def train(self) -> None:
        """Train in this process; process 0 writes the LoRA, however the run ends, if it has learned anything."""
        folder = self._parts.output / "blockskip" / "runs" / self._identity.key
        files, first = self._parts.files, self._together.rank == 0
        checkpoints = Checkpoints(
            folder, self._identity, every=files.save_every, keep=files.keep_last, resume=files.resume
        )  # fmt: skip
        if first:
            remove_old_runs(folder.parent, keep=KEPT_RUNS - 1, exclude=self._identity.key)
        result = TrainingResult()
        with self._file or nullcontext():
            try:
                with checkpoints.to_itself(self._wait) if first else nullcontext():
                    self._run_loop(checkpoints, result)
            except BaseException:  # a signal too, at any moment
                self._save_early(result)
                raise
            self._save(result)

    def _run_loop(self, checkpoints: Checkpoints, result: TrainingResult) -> None:
        parts, residuals = self._parts, self._parts.residuals
        if self._together.size > 1 and residuals.storage == "disk":
            write_cache_together(residuals, parts.dit, self._progress, self._together)
        steps = parts.config.steps
        told = OnStep(lambda report: self._progress("steps", report.step, steps, f"loss {report.loss:.4f}"))
        train_lora(
            parts.dit, residuals.schedule, residuals.latents, residuals.selection,
            source_of(residuals, parts.dit, self._progress), self._adapters, parts.config,
            result=result, observers=[told], checkpoints=checkpoints, together=self._together,
        )  # fmt: skip

    def _save_early(self, result: TrainingResult) -> None:
        """Save what a run has learned that did not end well; that end is told, not that the file could not be written."""
        try:
            self._save(result)
        except StorageError as problem:
            logger.error("The LoRA so far is not saved: %s", problem)

    def _save(self, result: TrainingResult) -> None:
        if self._file is None or not result.steps:
            return
        path = self._file.renew()
        save_lora(Lora(self._adapters, self._parts.run.selection, result), path)
        self._progress.say(f"The LoRA is {path}.")

    def _wait(self, step: int) -> None:
        steps = self._parts.config.steps
        self._progress("waiting for another process that trains the same run", min(step, steps), steps)


def _new_adapters(parts: _Parts) -> LoraAdapters:
    wanted = parts.dit.lora_layers(parts.run.selection, parts.lora.targets)
    layers = linear_names(parts.dit, parts.run.selection, wanted)
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    return LoraAdapters(shapes, parts.lora, seed=parts.config.seed)


def _identity(parts: _Parts, adapters: LoraAdapters) -> RunIdentity:
    """Return everything that determines the LoRA's values after a given number of steps."""
    config, first = parts.config, adapters.state_dict()
    return RunIdentity(
        {
            **{f"residuals: {name}": value for name, value in asdict(parts.residuals.identity).items()},
            "storage": "on the fly" if parts.residuals.storage == "on the fly" else "stored",
            "scale": adapters.scale,
            "frozen and tail": [parts.run.selection.frozen, parts.run.selection.tail],
            "targets": parts.lora.targets,
            "first values": tensors_identity(first[name] for name in sorted(first)),
            "made by": f"BlockSkip {VERSION}",
            **{name: value for name, value in asdict(config).items() if name not in config.without_effect},
        }
    )


_HOST = DiffusersHost()
start, prepare = _HOST.start, _HOST.prepare

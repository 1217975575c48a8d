"""A training as a run file, for ``python -m blockskip_core.train``: on another machine, or in several processes.

See ``runs.run_file``. The file names the pipeline's folder below the folders that the command line names; latents and
encoded captions lie beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...adapters.lora import LoraSettings
from ...api import Examples
from ...data.latents import as_tensors
from ...errors import InvalidInputError
from ...names import fault_of, repaired
from ...residuals.cache import CacheIdentity
from ...residuals.content_hash import Digest, module_identity, tensors_identity
from ...residuals.residual_set import Storage
from ...runs.packing import Material, write_material
from ...runs.run_file import ResidualRecipe, RunFile
from ...selection.selection import BlockSelection
from ...training.config import TrainingConfig
from .diffusers_dit import DiffusersDit
from .experts import Component
from .family import Text

HOST = "diffusers"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The model of a run file.

    Attributes:
        folder: The pipeline's folder, below a folder named with --models.
        dtype: Dtype in which its transformer is loaded.
        component: Which of its transformers, if it has two.
    """

    folder: str
    dtype: Literal["float32", "bfloat16", "float16"]
    component: Component = "transformer"


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run writes.

    Attributes:
        output_name: Name of the LoRA's file below the output folder, without ending; a number is appended.
        save_every: Steps between two training states; 0 for one at the end only.
        keep_last: How many of the newest states to keep.
        resume: Whether to continue from an earlier state.

    Raises:
        InvalidInputError: If the name is not a plain one that means the same on all systems.
    """

    output_name: str = "loras/blockskip"
    save_every: int = 100
    keep_last: int = 2
    resume: bool = True

    def __post_init__(self) -> None:
        parts = self.output_name.split("/")
        if not all(map(_NAME.fullmatch, parts)):
            raise InvalidInputError(
                f"output_name must be letters, digits, dots and dashes, with / between folders, got {self.output_name!r}."
            )
        if fault := next(filter(None, map(fault_of, parts)), ""):
            raise InvalidInputError(f"output_name {self.output_name!r} {fault}. Use a name such as {repaired(parts)}.")


def transformer_identity(transformer: nn.Module) -> str:
    """Return a content hash of a transformer's class and weights."""
    return f"{type(transformer).__name__} {module_identity(transformer)}"


def captions_identity(captions: Sequence[Text]) -> str:
    """Return a content hash of encoded texts."""
    digest = Digest(samples=None)
    digest.add([dict(sorted(text.items())) for text in captions])
    return digest.hexdigest()


def software() -> str:
    """Return the versions that may change numbers."""
    import diffusers

    return f"diffusers {diffusers.__version__}, torch {torch.__version__}"


def write_run(
    path: Path | str,
    dit: DiffusersDit,
    examples: Examples,
    selection: BlockSelection,
    config: TrainingConfig,
    *,
    folder: str,
    component: Component = "transformer",
    lora: LoraSettings | None = None,
    files: RunFiles | None = None,
    storage: Storage = "disk",
    chunk_size: int = 16,
) -> None:
    """Write a training as a run file, and its latents and captions beside it.

    Args:
        path: The run file, ending in .json; the other file ends in .safetensors.
        dit: The model, with its captions.
        examples: The examples to train on.
        selection: Blocks to be skipped.
        config: Settings of the training.
        folder: The pipeline's folder, below the folder that will be named with --models.
        component: Which of its transformers the model is, if it has two.
        lora: Rank, alpha and targets; by default 16, 16, and attention and MLP.
        files: What is written.
        storage, chunk_size: How residuals are kept, see ``residuals.source``.

    Raises:
        InvalidInputError: If the model is in a dtype that a run file cannot name.
        StorageError: If the disk cannot be written.
    """
    path = Path(path)
    model = ModelFolder(folder=folder, dtype=_dtype_name(dit.dtype), component=component)
    selection.require_for(len(dit.blocks), dit.family)
    beside = path.with_suffix(".safetensors")
    settings: dict[str, Any] = {
        "training": asdict(config),
        "lora": asdict(lora or LoraSettings()),
        "files": asdict(files or RunFiles()),
    }
    RunFile(
        host=HOST,
        model=asdict(model),
        settings=settings,
        schedule=examples.schedule,
        selection=selection,
        identity=CacheIdentity(
            model=transformer_identity(dit.model),
            schedule=examples.schedule.fingerprint,
            selection=selection.fingerprint,
            pictures=tensors_identity(as_tensors(examples.latents)),
            captions=captions_identity(dit.captions),
            dtype=str(dit.dtype),
            host=software(),
        ),
        residuals=ResidualRecipe(storage=storage, chunk_size=chunk_size, family=dit.family, back_residual="constant"),
        material=beside.name,
        material_hash=write_material(Material(examples.latents, dit.captions), beside),
    ).write(path)


def _dtype_name(dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise InvalidInputError(f"A run file's model must be in float32, bfloat16 or float16, got {name}.")
    return name

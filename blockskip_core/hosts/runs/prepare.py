"""Prepare a run for a request: check and set up everything, without loading or training anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...accounting.step_estimate import estimated_step_bytes
from ...adapters.lora import LinearShape, LoraAdapters
from ...data.latents import largest_shape
from ...errors import CacheError
from ...residuals.residual_set import ResidualSet
from ...training.checkpoints import Checkpoints, RunIdentity
from ...version import VERSION
from ..families.lora_names import FileNames, file_names
from ..files.folders import run_folder
from ..files.lora_files import NO_FILE, load_lora_file, output_path, require_writable
from ..files.start_lora import lora_to_start_from
from ..models.counted_run import formats_of
from ..models.hosted_dit import HostedDit
from ..models.identity import model_identity, tensors_identity
from ..models.patches import for_training
from ..models.quantised_blocks import QuantisedDit, require_available
from ..sampling.training_samples import TrainingSampler
from .request import RunRequest


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start.

    Attributes:
        request: The request, with the settings from Memory Plan.
        residuals: What replaces the skipped blocks.
        dit: The model as loaded, from which the residuals were computed.
        trained_dit: The model to train on: the same, or with its kept blocks quantised.
        adapters: The LoRA, with its initial values.
        first_values: Its initial values, for starting over.
        names: Names of its layers in the file.
        identity: What the run is, apart from its length.
        checkpoints: The training states.
        path: Where the LoRA will be saved.
        sampler: Samples pictures during training, or None.
        corrected: Whether offsets undo what 4-bit changes; eight bits change too little for it to be worth two passes.
    """

    request: RunRequest
    residuals: ResidualSet
    dit: HostedDit
    trained_dit: HostedDit | QuantisedDit
    adapters: LoraAdapters
    first_values: Mapping[str, Tensor]
    names: FileNames
    identity: RunIdentity
    checkpoints: Checkpoints
    path: Path
    sampler: TrainingSampler | None
    corrected: bool

    @property
    def step_bytes(self) -> int:
        """Approximate bytes that a step needs besides the weights."""
        config, dit, (channels, rows, columns) = self.request.config, self.dit, largest_shape(self.residuals.latents)
        text = max(dit.text_tokens(caption) for caption in range(len(self.residuals.captions)))
        estimated = estimated_step_bytes(
            num_kept=len(self.residuals.selection.kept),
            tokens=dit.image_tokens(rows, columns, channels) + text,
            width=dit.width,
            itemsize=dit.dtype.itemsize,
            batch_size=config.batch_size,
            checkpointing=config.checkpointing,
            lora_numbers=self.adapters.num_parameters,
        )
        return estimated + round(config.activation_budget) * config.checkpointing


def prepare(model: Any, residuals: ResidualSet, request: RunRequest) -> PreparedRun:
    """Check a request against the model and its residuals, and set up what the run needs.

    Raises:
        BlockSkipError: If inputs do not fit together, or the LoRA's file cannot be written.
    """
    request, model = request.planned_for(residuals), for_training(model)
    path = output_path(request.output_name)
    require_writable(path)
    _require_same_model(model, residuals)
    selection = residuals.selection
    dit = HostedDit(model, residuals.captions, largest_shape(residuals.latents))
    selection.require_for(len(dit.blocks), dit.family)
    dit.adapter.require_rows(request.config.batch_size)
    trained_dit = _quantised(dit, residuals, request)
    adapters = _adapters(model, dit, residuals, request)
    first_values = adapters.state_dict()
    rows = {name: adapters.up(name).shape[0] for name in adapters.names}
    names = file_names(model.model, dit.adapter, rows, request.file_format)
    corrected = request.correct_4bit and isinstance(trained_dit, QuantisedDit) and trained_dit.packs_into("4-bit")
    identity = _identity(residuals, request, adapters, first_values, corrected)
    checkpoints = Checkpoints(
        run_folder(identity.key), identity, every=request.save_every, keep=request.keep_last, resume=request.resume
    )  # fmt: skip
    sampler = None if request.samples is None else TrainingSampler(model, request.samples, selection)
    return PreparedRun(
        request=request, residuals=residuals, dit=dit, trained_dit=trained_dit, adapters=adapters,
        first_values=first_values, names=names, identity=identity, checkpoints=checkpoints, path=path, sampler=sampler,
        corrected=corrected,
    )  # fmt: skip


def _require_same_model(model: Any, residuals: ResidualSet) -> None:
    if model_identity(model) != residuals.identity.model:
        raise CacheError(
            "The residuals were computed from another model than the one connected here. Connect the same MODEL "
            "to Precompute Residuals and to Dynamic Patch Trainer."
        )


def _quantised(dit: HostedDit, residuals: ResidualSet, request: RunRequest) -> HostedDit | QuantisedDit:
    """Return the model to train on."""
    require_available(request.quantize_kept, dit.device)
    if residuals.selection.frozen:
        require_available(request.quantize_frozen, dit.device, "quantize_frozen")
    formats = formats_of(dit, residuals.selection, request.memory(residuals))
    return QuantisedDit(dit, formats) if formats else dit


@torch.inference_mode(False)
def _adapters(model: Any, dit: HostedDit, residuals: ResidualSet, request: RunRequest) -> LoraAdapters:
    """Return the LoRA with its initial values: random, or those of the LoRA to train further."""
    start_from = request.start_from
    if start_from is None and request.start_file != NO_FILE:
        start_from = load_lora_file(request.start_file)
    layers = dit.lora_layers(residuals.selection, request.targets)
    shapes = {name: LinearShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    adapters = LoraAdapters(shapes, request.lora, seed=request.seed)
    if start_from is not None:
        adapters.load_state_dict(lora_to_start_from(model, start_from, adapters))
    return adapters


def _identity(
    residuals: ResidualSet,
    request: RunRequest,
    adapters: LoraAdapters,
    first_values: Mapping[str, Tensor],
    corrected: bool,
) -> RunIdentity:
    """Return everything that determines the LoRA's values after a given number of steps."""
    config = request.config
    return RunIdentity(
        {
            **{f"residuals: {name}": value for name, value in asdict(residuals.identity).items()},
            "storage": "on the fly" if residuals.storage == "on the fly" else "stored",
            "scale": adapters.scale,
            "quantize_kept": request.quantize_kept,
            **({"quantize_frozen": request.quantize_frozen} if residuals.selection.frozen else {}),
            **({"correct_4bit": True} if corrected else {}),
            **({"kept last": residuals.selection.tail} if residuals.selection.tail else {}),
            "targets": request.targets,
            "first values": tensors_identity(first_values[name] for name in sorted(first_values)),
            "made by": f"BlockSkip {VERSION}",
            **{name: value for name, value in asdict(config).items() if name not in config.without_effect},
        }
    )

"""The method in four calls, for Python without a host: select, precompute, train, apply.

Each call covers the most common use of the packages below. For more (residuals on disk, samples between steps), call
``training.loop.train_lora`` and ``residuals.sources`` directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapters.lora import LinearShape, LoraAdapters, LoraSettings
from .adapters.lora_formats import to_file_tensors
from .adapters.lora_metadata import metadata_to_strings
from .blocks.weight_sharing import weight_sharing_copy
from .data.crops import TrainingCrops
from .data.latents import Latents, joined, shapes_in_words
from .data.micro_batches import MicroBatches
from .data.schedule import TrainingSchedule
from .errors import InvalidInputError
from .files import write_atomically
from .model import Denoiser, SkippableDit, linear_names
from .residuals.precompute import Precomputed, Progress, precompute_residuals
from .residuals.source import OpenResiduals, ResidualSource
from .selection.presets import preset_selection
from .selection.selection import BlockSelection
from .training.checkpoints import Checkpoints
from .training.config import TrainingConfig
from .training.loop import train_lora
from .training.observer import TrainingObserver
from .training.result import TrainingResult


@dataclass(frozen=True)
class Examples:
    """The examples to train on.

    Attributes:
        schedule: The training examples: crop, noise level, noise and caption of each.
        latents: The clean latent of each, in the model's own scale, (C, H, W); in one tensor, or in a list if they differ
            in shape.

    Raises:
        InvalidInputError: If there is not one latent per example.
    """

    schedule: TrainingSchedule
    latents: Latents

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.schedule) or any(one.ndim != 3 for one in self.latents):
            raise InvalidInputError(
                f"Expected latents of shape ({len(self.schedule)}, C, H, W), one per training example, "
                f"got {shapes_in_words(self.latents)}."
            )

    @classmethod
    def encoded(
        cls, pictures: Sequence[Tensor], schedule: TrainingSchedule, encode: Callable[[Tensor], Tensor]
    ) -> Examples:
        """Cut the crops that a schedule asks for, and encode them.

        Args:
            pictures: Each (H, W, 3), range [0, 1].
            schedule: Made by ``draw_schedule`` for pictures of these sizes.
            encode: A crop (height, width, 3) -> its latent (C, H, W).
        """
        crops = TrainingCrops(pictures, schedule)
        latents = {index: encode(crops[index]) for index in crops.by_picture(range(len(crops)))}
        return cls(schedule, joined(latents[index] for index in range(len(crops))))


class MemoryResiduals:
    """The residuals of all examples, in host memory; a :class:`~.residuals.source.ResidualSource`."""

    def __init__(self, computed: Precomputed) -> None:
        self.computed = computed

    def stretches(self, run: MicroBatches, start: int = 0) -> Iterator[AbstractContextManager[OpenResiduals]]:
        """Yield one stretch: the whole run, from ``start`` on."""
        if start < len(run):
            residual = self.computed.residuals.__getitem__
            yield nullcontext(OpenResiduals(range(start, len(run)), residual, self.computed.reference))


@dataclass(frozen=True)
class Lora:
    """A trained LoRA.

    Attributes:
        adapters: Its tensors.
        selection: The blocks that were skipped while it was trained.
        result: What the training reported.
    """

    adapters: LoraAdapters
    selection: BlockSelection
    result: TrainingResult

    def save(self, path: Path | str, file_format: Literal["peft", "kohya"] = "peft") -> None:
        """Write the LoRA to a safetensors file.

        Raises:
            StorageError: If the disk cannot be written.
        """
        settings = self.adapters.settings
        tensors = to_file_tensors(self.adapters.state_dict(), self.adapters.scale, file_format)
        metadata = metadata_to_strings({"steps": self.result.steps, "rank": settings.rank, "alpha": settings.alpha})
        write_atomically(Path(path), lambda file: save_file(tensors, file, metadata))


def select(dit: SkippableDit, skip_ratio: float) -> BlockSelection:
    """Return the blocks that the paper skips at a ratio, scaled to the model's depth.

    ``selection.text_influence`` has the paper's method of measuring the best ones on a model.

    Args:
        dit: The model.
        skip_ratio: Share of the blocks to skip, from 0 to 0.9.

    Raises:
        InvalidInputError: If the ratio is out of range.
    """
    return preset_selection(skip_ratio, len(dit.blocks), dit.family, [block.num_bytes for block in dit.blocks])


def precompute(
    dit: SkippableDit, examples: Examples, selection: BlockSelection, *, progress: Progress | None = None
) -> MemoryResiduals:
    """Compute what the skipped blocks do to each example, with a few blocks on the device at a time.

    Args:
        dit: The model; left unchanged.
        examples: The examples of the training.
        selection: Blocks to be skipped.
        progress: Called with (block passes done, total); may raise to interrupt.

    Raises:
        TrainingError: If a block's output is not finite.
    """
    return MemoryResiduals(
        precompute_residuals(
            dit, examples.schedule, examples.latents, selection, range(len(examples.schedule)),
            room=dit.room_for_blocks, progress=progress,
        )
    )  # fmt: skip


def train(
    dit: SkippableDit,
    examples: Examples,
    selection: BlockSelection,
    config: TrainingConfig,
    *,
    lora: LoraSettings | None = None,
    layers: Callable[[str], bool] = lambda name: True,
    residuals: ResidualSource | None = None,
    checkpoints: Checkpoints | None = None,
    observers: Sequence[TrainingObserver] = (),
) -> Lora:
    """Train a LoRA on the kept blocks of a model; the skipped ones are not needed during training.

    Args:
        dit: The model; left unchanged.
        examples: The examples to train on.
        selection: Blocks to be skipped.
        config: Number of steps, learning rate and so on.
        lora: Rank and alpha; by default 16 and 16. ``targets`` is ignored: see ``layers``.
        layers: Native name of a kept block's linear layer -> whether it gets an adapter; by default all do.
        residuals: From :func:`precompute`, or any other source; by default they are precomputed first.
        checkpoints: Where states for resuming are kept; by default none are.
        observers: Notified of each step, e.g. ``OnStep(print)``; they may raise to interrupt.

    Raises:
        InvalidInputError: If the selection is for another model, or no layer is left to train.
        TrainingError: If a loss or gradient is not finite, the model with skipped blocks differs from the whole one
            before the first step, or a kept block gets no gradient.
    """
    selection.require_for(len(dit.blocks), dit.family)
    shapes = {
        name: LinearShape(layer.in_features, layer.out_features)
        for name, layer in linear_names(dit, selection, layers).items()
    }
    dtype = torch.promote_types(dit.dtype, torch.float32)
    adapters = LoraAdapters(shapes, lora or LoraSettings(), seed=config.seed, dtype=dtype)
    result = TrainingResult()
    train_lora(
        dit, examples.schedule, examples.latents, selection, residuals or precompute(dit, examples, selection),
        adapters, config, result=result, observers=observers, checkpoints=checkpoints,
    )  # fmt: skip
    return Lora(adapters, selection, result)


@contextmanager
def apply(dit: SkippableDit, lora: Lora) -> Iterator[Denoiser]:
    """Run the whole model with a LoRA, without gradients; afterwards the model is as before.

    Args:
        dit: The model that the LoRA was trained on.
        lora: The LoRA.

    Yields:
        ``denoise(noisy (B, C, H, W), sigmas (B,), caption indices) -> clean estimate``.
    """
    names = [*dit.frozen_stem, *(block.name for block in dit.blocks), *dit.trainable_head]
    copies = {name: weight_sharing_copy(dit.module(name)) for name in names}
    wanted = set(lora.adapters.names)
    layers = {
        f"{stem}.{path}": layer
        for stem, copy in copies.items()
        for path, layer in copy.named_modules()
        if f"{stem}.{path}" in wanted
    }
    lora.adapters.to(dit.device)
    try:
        with (
            torch.no_grad(),
            dit.running(copies) as denoise,
            lora.adapters.attached(layers, dit.weight_for_backward),
        ):
            yield denoise
    finally:
        lora.adapters.to(torch.device("cpu"))

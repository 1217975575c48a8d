"""What the training of patch adapters needs, counted before it starts: two steps of the real loop without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...accounting.measuring import Counting
from ...accounting.phase_counts import PhaseCount
from ...accounting.weight_formats import stored_bytes
from ...adapters.lora import LoraSettings
from ...ddit.coarse_estimate import CoarseAdapter
from ...ddit.connection import PatchStatistics
from ...ddit.patch_adapter import PatchAdapter
from ...ddit.patch_resizing import PatchResizing, ResizeKind
from ...distillation.examples import Batch, Examples
from ...distillation.loop import DistillationResult, distill
from ...distillation.settings import DistillationSettings
from .coarse_distillation import TrainedParts, distilling
from .hosted_dit import HostedDit
from .weightless_dit import WeightlessDit


def counted_distillation(
    dit: HostedDit, shape: Sequence[int], scale: int, lora: LoraSettings, batch_size: int, *,
    resize: ResizeKind = "nearest", checkpointing: bool = True,
) -> PhaseCount:  # fmt: skip
    """Count the training of one patch size.

    Args:
        dit: The model, with at least two captions; nothing of it is loaded.
        shape: (C, H, W), where C counts the channels of all frames.
        scale: The patch size, as a multiple of the model's own.
        lora, batch_size, resize, checkpointing: As in the training.
    """
    twin, latents = WeightlessDit.of(dit), torch.zeros(2, *shape)
    longest = max(range(len(dit.arguments)), key=dit.text_length)
    other = (longest + 1) % len(dit.arguments)
    examples = OneMeasured(latents, [other, longest], lambda uniform: 0.5, seed=0)  # the first one is held out
    settings = DistillationSettings(steps=2, batch_size=batch_size, learning_rate=1e-4, validate_every=2)
    resizing = PatchResizing(dit.adapter.patch_size, scale, resize, dit.frames)
    statistics = PatchStatistics.of(latents, resizing)
    after: list[int] = []
    with Counting() as counting:
        with torch.inference_mode(False), torch.device("meta"):
            patches = PatchAdapter(shape[0] // dit.frames * resizing.side**2, dit.width, seed=0)
            parts = _PartsOnMeta(twin, CoarseAdapter(resizing, statistics, patches), lora, 0)
        with distilling(twin, parts, checkpointing=checkpointing) as model:
            weights = sum(tensor.nbytes for tensor in _tensors(twin.patcher.model.diffusion_model))
            distill(
                model, examples, settings, result=DistillationResult(),
                on_step=lambda result: after.append(counting.operations),
            )  # fmt: skip
    count = PhaseCount(
        weights=weights, peak=counting.peak(twin.device), operations=after[-1] - after[-2],
        host=counting.peak(torch.device("cpu")),
    )  # fmt: skip
    return count.with_weights(sum(map(stored_bytes, _tensors(dit.patcher.model.diffusion_model))))


class OneMeasured(Examples):
    """Examples whose held-out error is measured at one noise level: all of them take the same memory."""

    def held_out_batches(self, most: int) -> list[Batch]:
        """Return the first of the held-out examples."""
        return super().held_out_batches(most)[:1]


class _PartsOnMeta(TrainedParts):
    """Trained parts that stay where they are."""

    def to(self, device: torch.device) -> None:
        """Move nothing."""


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())

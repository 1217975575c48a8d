"""Operations of a MODEL's call by its number of image tokens, counted without weights."""

from __future__ import annotations

import torch

from ...accounting.measuring import Counting
from ...ddit.operations import StepOperations
from .hosted_dit import HostedDit
from .weightless_dit import WeightlessDit

_SIDES = (4, 8, 12)  # tokens per side of the pictures that are counted


def counted_operations(dit: HostedDit) -> StepOperations:
    """Return the operations of a call with the model's first caption.

    Args:
        dit: The model, with at least one caption.
    """
    return operations_by_tokens(WeightlessDit.of(dit))


def operations_by_tokens(dit: WeightlessDit) -> StepOperations:
    """Return the operations of a call with the first caption of a model without weights.

    They are counted on pictures: those of a clip depend on its number of tokens in the same way.
    """
    patch, channels = dit.adapter.patch_size, dit.patcher.model.latent_format.latent_channels
    counts = {}
    with torch.inference_mode(False), torch.no_grad(), dit.running({}) as denoise:
        for side in _SIDES:
            noisy = torch.empty(1, channels, side * patch, side * patch, device="meta")
            with Counting() as counting:
                denoise(noisy, torch.empty(1, device="meta"), [0])
            counts[dit.image_tokens(side * patch, side * patch, channels)] = float(counting.operations)
    return StepOperations.through(counts, dit.text_tokens(0))

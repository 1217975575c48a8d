"""The noise that the host's samplers start from, without the host's side effect."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sample
import torch
from torch import Tensor


def start_noise(latent: Tensor, seed: int, batch_indices: Sequence[int] | None = None) -> Tensor:
    """Return what ``comfy.sample.prepare_noise`` returns, which also seeds the global generators of all devices.

    Args:
        latent: As the host's model takes it; only its shape and dtype matter.
        seed: Of the noise.
        batch_indices: Which pictures of a batch these are, as in the host's ``batch_index``.
    """
    return comfy.sample.prepare_noise_inner(latent, torch.Generator().manual_seed(seed), batch_indices)

"""Rectified flow, the way FLUX-like models are trained (arXiv 2209.03003; arXiv 2403.03206, Sec. 3).

    noisy = (1 - sigma) clean + sigma noise            velocity = noise - clean

A host returns the model's clean estimate ``denoised`` rather than its velocity; the velocity's error follows from it:

    v - v_target = (noisy - denoised) / sigma - (noise - clean) = (clean - denoised) / sigma

Axis legend: ``B`` batch, ``C H W`` latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .latents import Latents, in_batch
from .schedule import TrainingSchedule

LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]


def noisy_batch(schedule: TrainingSchedule, latents: Latents, draws: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (noisy, clean, sigmas) of some draws, on the CPU.

    Args:
        schedule: The draws.
        latents: Clean latents of all draws in the model's own scale, each (C, H, W).
        draws: Indices of draws of one shape; they become the batch axis.

    Returns:
        Shapes (B, C, H, W), (B, C, H, W) and (B,).
    """
    clean = in_batch(latents, draws)
    sigmas = torch.tensor([schedule[draw].sigma for draw in draws], dtype=clean.dtype)
    noise = torch.stack([schedule[draw].noise(clean.shape[1:], clean.dtype) for draw in draws])
    weight = sigmas.view(-1, *[1] * (clean.ndim - 1))
    return (1.0 - weight) * clean + weight * noise, clean, sigmas


def velocity_loss(denoised: Tensor, clean: Tensor, sigmas: Tensor, weighting: LossWeighting = "none") -> Tensor:
    """Return the velocity error of each row, shape (B,).

    Args:
        denoised, clean: Shape (B, C, H, W).
        sigmas: Shape (B,), positive.
        weighting: Factor per noise level, as diffusers computes it for SD3 (arXiv 2403.03206, Sec. 3.1).
    """
    view = sigmas.view(-1, *[1] * (clean.ndim - 1))
    error = ((clean - denoised) / view).square().flatten(1).mean(1)
    if weighting == "none":
        return error
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return error * compute_loss_weighting_for_sd3(weighting, sigmas)

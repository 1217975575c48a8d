"""One latent by the host's own Euler from a running model, for nodes that call the model themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from torch import Tensor

from ...model import Denoiser
from ..inputs.frames import with_frames, without_frames
from ..models.hosted_dit import HostedDit
from .start_noise import start_noise


def euler_latent(
    dit: HostedDit,
    denoise: Denoiser,
    shape: Sequence[int],
    *,
    prompt: int,
    against: int,
    cfg: float,
    scheduler: str,
    steps: int,
    seed: int,
    on_step: Callable[[int], None],
) -> Tensor:
    """Return the latent of one picture, (1, C, H, W), on the CPU.

    Args:
        dit: The model.
        denoise: Its denoiser, while it is running.
        shape: (C, H, W).
        prompt: Index of its caption.
        against: Index of the negative caption; used with ``cfg`` other than 1.
        cfg: Guidance scale.
        scheduler: Name of one of the host's schedulers.
        steps: Number of steps.
        seed: Of the noise.
        on_step: Called with the number of steps done.
    """
    model = dit.patcher.model
    sampling = dit.patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).to(dit.device)
    empty = torch.zeros(1, *shape)
    noise = without_frames(model, start_noise(with_frames(model, empty), seed)).to(dit.device)
    whole = _starts_at_pure_noise(sampling, sigmas)
    start = sampling.noise_scaling(sigmas[0], noise, empty.to(noise), whole)

    def guided(noisy: Tensor, sigma: Tensor) -> Tensor:
        towards = denoise(noisy, sigma, [prompt])
        if cfg == 1.0:
            return towards
        away = denoise(noisy, sigma, [against])
        return away + (towards - away) * cfg

    def report(state: dict[str, Any]) -> None:
        on_step(state["i"] + 1)

    latent = comfy.k_diffusion.sampling.sample_euler(guided, start, sigmas, callback=report, disable=True)
    return sampling.inverse_noise_scaling(sigmas[-1], latent).cpu()


def _starts_at_pure_noise(sampling: Any, sigmas: Tensor) -> bool:
    """Return whether sampling starts at pure noise, by the host's rule."""
    largest = float(sampling.sigma_max)
    return bool(abs(float(sigmas[0]) - largest) <= 1e-5 * largest or float(sigmas[0]) > largest)

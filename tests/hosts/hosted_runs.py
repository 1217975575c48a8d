"""Runs of the tiny FLUX.1: the full model, the model with replayed residuals, a training run, a sampled picture."""

from __future__ import annotations

import torch

from .tiny_families import FLUX, PLAN, TEXT_LENGTHS, replayed
from .tiny_flux import captions

__all__ = [
    "LATENT_SHAPE", "NUM_BLOCKS", "PLAN", "TEXT_LENGTHS", "chosen", "clean_latents", "flux_lora", "full_forward",
    "host_sample", "hosted", "plain_forward", "replayed", "run",
]  # fmt: skip

LATENT_SHAPE = FLUX.latent_shape
NUM_BLOCKS = FLUX.num_blocks

plain_forward = FLUX.plain_forward
clean_latents = FLUX.clean_latents
chosen = FLUX.chosen
full_forward = FLUX.full_forward
flux_lora = FLUX.lora
run = FLUX.run


def hosted(patcher, lengths=TEXT_LENGTHS, guidance: float | None = None):
    """Return the MODEL as a SkippableDit with captions of these lengths."""
    return FLUX.hosted(patcher, lengths, **({} if guidance is None else {"guidance": guidance}))


def host_sample(patcher, conditioning=None, seed=3):
    """A latent sampled as in a ComfyUI workflow."""
    import comfy.sample

    empty = torch.zeros(1, *LATENT_SHAPE)
    conditioning = conditioning or captions()[0]
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(empty, seed), 3, 1.0, "euler", "simple", conditioning, conditioning, empty,
        disable_pbar=True, seed=seed,
    )  # fmt: skip

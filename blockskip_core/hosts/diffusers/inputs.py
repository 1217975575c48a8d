"""Texts and pictures of a training, converted by a pipeline's own encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...api import Examples
from ...data.patch_sampling import PatchConfig
from ...data.schedule import TrainingSchedule
from ...errors import InvalidInputError
from .experts import Component, require_in_range
from .families import family_of_pipeline
from .family import Family, Text


def _family(pipeline: Any) -> Family:
    return family_of_pipeline(type(pipeline).__name__)


@torch.no_grad()
def encode_captions(pipeline: Any, texts: Sequence[str], *, device: torch.device | str | None = None) -> list[Text]:
    """Return texts as the pipeline encodes them when it makes pictures, on the CPU.

    Args:
        pipeline: A pipeline of diffusers, with its text encoders.
        texts: The captions.
        device: Where the text encoders run; afterwards they are where they were. By default that is where they are.

    Raises:
        UnsupportedModelError: If the pipeline's family is not known.
    """
    family = _family(pipeline)
    encoders = [
        part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part is not None
    ]
    with _moved(encoders, device) as place:
        encoded = [family.encode_text(pipeline, text, place) for text in texts]
    return [{name: value.cpu() for name, value in text.items()} for text in encoded]


@torch.no_grad()
def encode_examples(
    pipeline: Any,
    pictures: Sequence[Tensor],
    schedule: TrainingSchedule,
    *,
    device: torch.device | str | None = None,
    component: Component = "transformer",
) -> Examples:
    """Cut the crops that a schedule asks for, and encode them with the pipeline's VAE, in the transformer's own scale.

    Args:
        pipeline: A pipeline of diffusers, with its VAE.
        pictures: Each (H, W, 3), range [0, 1].
        schedule: Made by ``draw_schedule`` for pictures of these sizes.
        device: Where the VAE runs; afterwards it is where it was. By default that is where it is.
        component: The transformer that will be trained, where two share the noise levels.

    Raises:
        UnsupportedModelError: If the pipeline's family is not known.
        InvalidInputError: If a latent is not finite, or the pipeline does not call this transformer with all noise levels of
            the schedule.
    """
    family, vae = _family(pipeline), pipeline.vae
    require_in_range(pipeline, component, schedule)

    def encode(crop: Tensor) -> Tensor:
        pixels = 2.0 * crop.movedim(-1, 0)[None] - 1.0
        latent = family.encode_picture(vae, pixels.to(place, vae.dtype))[0].float().cpu()
        if not torch.isfinite(latent).all():
            raise InvalidInputError("The VAE made a latent with NaN or Inf. Load it in fp32 or bf16.")
        return latent

    with _moved([vae], device) as place:
        return Examples.encoded(pictures, schedule, encode)


@contextmanager
def _moved(modules: Sequence[nn.Module], device: torch.device | str | None) -> Iterator[torch.device]:
    """Have modules on a device within the context; yields the device."""
    before = [next(module.parameters()).device for module in modules]
    place = torch.device(device) if device is not None else next(iter(before), torch.device("cpu"))
    try:
        for module in modules:
            module.to(place)
        yield place
    finally:
        for module, home in zip(modules, before, strict=True):
            module.to(home)


def crop_multiple(pipeline: Any) -> int:
    """Return the number of pixels that crop sides are multiples of: the side of a token."""
    family = _family(pipeline)
    scale = getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial
    return scale * family.vae_cells * family.patch


def paper_patches(pipeline: Any) -> PatchConfig:
    """Return the paper's crops: of 256 px from pictures of 512 px for FLUX, of 512 px from 1024 px for SANA.

    Source: arXiv 2603.20755, second hand; the larger side is inferred from its baselines. It has no other family; those get
    FLUX's.
    """
    smallest, largest = _family(pipeline).patches
    return PatchConfig(patch_min=smallest, patch_max=largest, multiple=crop_multiple(pipeline))


def noise_shift(pipeline: Any, side: int) -> float:
    """Return by how much the pipeline's scheduler shifts noise levels, for ``sigma_sampler("shifted", shift=...)``.

    Args:
        pipeline: A pipeline of diffusers, with its scheduler.
        side: Side in pixels of the training pictures; some schedulers shift large pictures more.
    """
    config = pipeline.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    num_tokens, family = (side // crop_multiple(pipeline)) ** 2, _family(pipeline)
    mu = _linear_mu(config, num_tokens) if family.mu is None else family.mu(num_tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _linear_mu(config: Any, num_tokens: int) -> float:
    """Return mu on the line through the two points of a scheduler's configuration."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (num_tokens - few) * (high - low) / (many - few)

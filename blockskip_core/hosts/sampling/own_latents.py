"""Latents that a model samples itself, to train on: seeded, and kept on disk for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import comfy.samplers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InvalidInputError, StorageError
from ...files import open_tensors, write_atomically
from ..files.folders import latents_file
from ..inputs.frames import with_frames
from ..models.hosted_dit import HostedDit
from .plain_euler import euler_latent

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OwnLatents:
    """What to sample.

    Attributes:
        per_prompt: Pictures or clips of each prompt.
        width, height: Pixels.
        steps, scheduler, cfg: Of the host's Euler.
        seed: Of the first picture; the others count up.
        frames: Pictures of a clip; 1 for single pictures.

    Raises:
        InvalidInputError: If a setting is out of range.
    """

    per_prompt: int
    width: int
    height: int
    steps: int = 20
    scheduler: str = "simple"
    cfg: float = 1.0
    seed: int = 0
    frames: int = 1

    def __post_init__(self) -> None:
        for name in ("per_prompt", "steps"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.cfg <= 100.0:
            raise InvalidInputError(f"cfg must be between 0 and 100, got {self.cfg}.")
        if self.scheduler not in comfy.samplers.SCHEDULER_NAMES:
            raise InvalidInputError(
                f"scheduler must be one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}, got {self.scheduler!r}."
            )

    def parts(self) -> dict[str, Any]:
        """Return everything that decides what is sampled, as JSON."""
        parts = asdict(self)
        if self.frames == 1:
            del parts["frames"]  # pictures are named as they were before there were clips
        return parts

    def key(self, identity: str) -> str:
        """Return the content hash of these latents of a model with prompts of this identity."""
        parts = {"version": _VERSION, "identity": identity, **self.parts()}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def own_latents(
    dit: HostedDit,
    request: OwnLatents,
    shape: Sequence[int],
    num_prompts: int,
    identity: str,
    on_step: Callable[[int, int], None],
) -> Tensor:
    """Return latents, prompt by prompt, (num_prompts * per_prompt, C, H, W), float32, on the CPU.

    Args:
        dit: The model; its first ``num_prompts`` captions are the prompts, and the next one is the negative.
        request: What to sample.
        shape: (C, H, W), where C counts the channels of all frames.
        num_prompts: Number of prompts.
        identity: Of model and captions; latents of the same identity and request are read from disk.
        on_step: Called after every sampler step with (done, total); may raise to interrupt.
    """
    path = latents_file(request.key(identity))
    total = num_prompts * request.per_prompt
    try:
        with open_tensors(path) as file:
            stored = file.get_tensor("latents")
        if tuple(stored.shape) == (total, *shape):
            return stored
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError) as error:
        logger.warning("BlockSkip: sampling latents again, because %s cannot be read (%s)", path.name, error)
    made, model = [], dit.patcher.model
    needed = int(model.memory_required(with_frames(model, torch.empty(1, *shape, device="meta")).shape))
    with torch.inference_mode(False), torch.no_grad(), dit.running({}, activation_bytes=needed) as denoise:
        for number in range(total):
            latent = euler_latent(
                dit, denoise, shape, prompt=number // request.per_prompt, against=num_prompts, cfg=request.cfg,
                scheduler=request.scheduler, steps=request.steps, seed=(request.seed + number) % 2**63,
                on_step=partial(_counted, on_step, number * request.steps, total * request.steps),
            )  # fmt: skip
            made.append(latent.float())
    latents = torch.cat(made)
    try:
        write_atomically(path, lambda temporary: save_file({"latents": latents.contiguous()}, temporary))
    except StorageError as error:  # they are only sampled again
        logger.warning("BlockSkip: %s", error)
    return latents


def _counted(on_step: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_step(before + done, total)

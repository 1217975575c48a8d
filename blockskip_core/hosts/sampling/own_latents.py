"""Latents that a model samples itself, to train on: seeded, and kept on disk for the next run.

Each depends on its prompt and its own seed only. Until all are made, every one is kept in a file of its own, so that a
run that was cancelled or killed goes on from there; then they become one file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InvalidInputError, StorageError, TrainingError
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

    Raises:
        TrainingError: If the model samples a latent that is not finite; it is not kept.
    """
    path = latents_file(request.key(identity))
    total, parts = num_prompts * request.per_prompt, path.with_suffix("")
    if (stored := _stored(path, (total, *shape))) is not None:
        _remove(parts)  # of another process that made the same and was killed
        return stored
    made, model = [], dit.patcher.model
    needed = int(model.memory_required(with_frames(model, torch.empty(1, *shape, device="meta")).shape))
    with torch.inference_mode(False), torch.no_grad(), dit.running({}, activation_bytes=needed) as denoise:
        for number in range(total):
            part = parts / f"{number:06}.safetensors"
            if (known := _stored(part, (1, *shape))) is not None:
                made.append(known)
                continue
            latent = euler_latent(
                dit, denoise, shape, prompt=number // request.per_prompt, against=num_prompts, cfg=request.cfg,
                scheduler=request.scheduler, steps=request.steps, seed=(request.seed + number) % 2**63,
                on_step=partial(_counted, on_step, number * request.steps, total * request.steps),
            ).float()  # fmt: skip
            _require_finite(latent, number // request.per_prompt, request)
            _store(part, latent)
            made.append(latent)
    latents = torch.cat(made)
    if _store(path, latents):
        _remove(parts)
    return latents


def _stored(path: Path, shape: Sequence[int]) -> Tensor | None:
    """Return the latents of a file; None if there is none, or it cannot be used."""
    try:
        with open_tensors(path) as file:
            latents = file.get_tensor("latents")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("BlockSkip: sampling latents again, because %s cannot be read (%s)", path.name, error)
        return None
    if tuple(latents.shape) != tuple(shape) or not latents.isfinite().all():
        logger.warning("BlockSkip: sampling latents again, because %s is damaged", path.name)
        return None
    return latents


def _store(path: Path, latents: Tensor) -> bool:
    """Write latents, and return whether they could be; without them they are only sampled again."""
    try:
        write_atomically(path, lambda temporary: save_file({"latents": latents.contiguous()}, temporary))
    except StorageError as error:
        logger.warning("BlockSkip: %s", error)
        return False
    return True


def _remove(parts: Path) -> None:
    shutil.rmtree(parts, ignore_errors=True)  # what stays does no harm


def _require_finite(latent: Tensor, prompt: int, request: OwnLatents) -> None:
    if not latent.isfinite().all():
        raise TrainingError(
            f"The latent that the model sampled of prompt {prompt + 1} is not finite, with `sampler_steps` {request.steps}, "
            f"`scheduler` {request.scheduler} and `cfg` {request.cfg}. Change these, or load the model in bf16."
        )


def _counted(on_step: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_step(before + done, total)

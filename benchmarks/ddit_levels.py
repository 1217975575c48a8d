"""Adapters trained on all noise levels and on those of coarse steps alone, compared at the latter on unseen prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import ddit_world
import numpy as np
import torch
from blockskip_pack.blockskip_core.ddit.coarse_levels import CoarseLevels, CoarseSteps
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches, TrainedScale
from blockskip_pack.blockskip_core.distillation.examples import SMALLEST_SIGMA, Batch, levels_through
from blockskip_pack.blockskip_core.distillation.validation import HeldOut
from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.model import Denoiser
from ralu_pictures import World
from torch import Tensor

SCALE, SEED = 2, 300
PLANS = {"every other of 20": CoarseSteps(20), "late window: 6-11 of 12": CoarseSteps(12, "6-11: 2")}
logger = logging.getLogger("__main__")


def rows(world: World, side: int, steps: int, prompts: int) -> list[dict[str, Any]]:
    """Train on all levels and on those of each plan, with the same seeds and steps, and return a row per plan.

    Args:
        world: With the unseen prompts.
        side: Of all pictures in pixels.
        steps: Of each training.
        prompts: Of the trainings.
    """
    everywhere = ddit_world.train(world, side, steps, prompts, (SCALE,))[0]
    found = []
    for name, plan in PLANS.items():
        levels = plan.levels(ddit_world.sigmas_of(world, plan.steps), SCALE, (SCALE,), least=SMALLEST_SIGMA)
        there = ddit_world.train(world, side, steps, prompts, (SCALE,), plan)[0]
        found.append({
            "name": name, "side": side, "prompts": prompts, "steps": steps, "unseen": len(world.scenes),
            "levels": levels_through(levels),
            **{
                arm: errors_at(world, side, trained, levels) for arm, trained in (("everywhere", everywhere), ("there", there))
            },
            "kept": [trained.scales[SCALE].steps for trained in (everywhere, there)],
        })  # fmt: skip
        logger.info("%s: %s", name, [np.mean(found[-1][arm]) for arm in ("everywhere", "there")])
    return found


def errors_at(world: World, side: int, trained: TrainedPatches, levels: CoarseLevels) -> list[list[float]]:
    """Return the relative error of the velocity on each unseen prompt, by noise level, rising."""
    with torch.inference_mode():
        latents = world.encoded(world.drawn(side))
    captions = [world.conditioning(scene) for scene in world.scenes]
    dit = HostedDit(world.model.clone(), captions, latents.shape[1:])
    forward = CoarseForward(dit.patcher)
    forward.prepare(dit.patcher)
    with torch.inference_mode(False), torch.no_grad(), dit.running({}) as denoise:
        model = _Trained(dit, denoise, forward.renewed(), trained.on(dit.device).scales[SCALE])
        return [
            list(HeldOut(model, batches(latents[place], place, levels_through(levels))).errors(model.student))
            for place in range(len(latents))
        ]


def batches(clean: Tensor, caption: int, levels: Sequence[float]) -> list[Batch]:
    """Return one latent with seeded noise at every level, a batch of one each."""
    found = []
    for place, level in enumerate(levels):
        generator = torch.Generator().manual_seed(SEED + 1000 * caption + place)
        noise = torch.randn(clean.shape, generator=generator)
        found.append(Batch(((1.0 - level) * clean.cpu() + level * noise)[None], torch.tensor([level]), [caption]))
    return found


class _Trained:
    """Trained adapters as a student, without gradients."""

    def __init__(self, dit: HostedDit, denoise: Denoiser, forward: CoarseForward, entry: TrainedScale) -> None:
        self.device, self.teacher, self._forward, self._entry = dit.device, denoise, forward, entry
        self._options = dit.patcher.model_options["transformer_options"]

    def student(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        denoise = partial(_for_captions, self.teacher, captions)
        return self._forward(denoise, noisy, sigmas, self._entry.coarse, self._entry.lora, self._options)

    def attached(self) -> nullcontext[None]:
        return nullcontext()


def _for_captions(denoise: Denoiser, captions: Sequence[int], noisy: Tensor, sigmas: Tensor) -> Tensor:
    return denoise(noisy, sigmas, captions)

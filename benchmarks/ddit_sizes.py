"""At which size of pictures coarse steps begin to pay: their error by size, and the error that would still pay.

A coarse step pays if a run with some of them is nearer to the run of many steps than one of fewer steps with the same
operations. Both are measured as the relative difference of latents from ``FULL`` steps with the same noise. How small the
error has to be is found by making it smaller: the velocity of a coarse step is moved from the coarse call's towards the
model's own, at the operations of the coarse one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.patcher_extension
import comfy.sample
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.distillation.examples import LEVELS
from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches, RunRecord
from ralu_pictures import CELL, SEED, TOKEN, World, plain
from sampling_ways import EVERY_OTHER
from torch import Tensor

PICTURES = 3
SIDES = (128, 192, 256, 384, 512)
FULL = 28
SHARES = (1.0, 0.5, 0.25, 0.1)  # of the coarse call's error that remains
RUNS = {
    256: {128: 10, 256: 10},
    512: {256: 10, 512: 10},
}  # side of the training -> side -> steps, every other one coarse
PLAIN = (5, 6, 7, 8)
logger = logging.getLogger("__main__")


def errors(world: World, trained: TrainedPatches, trained_at: int) -> list[dict[str, Any]]:
    """Return a row per size and patch size: the relative error of a coarse call's velocity by noise level.

    Adapters were trained at ``trained_at`` pixels.

    ``untrained`` is a call without any training, ``start`` one with the connection by statistics of pictures of that size, and
    ``trained`` one with the adapters, whatever size they were trained at. Noise on drawings of prompts that were not
    trained on.
    """
    found = []
    for side in SIDES:
        latents = world.encoded(world.drawn(side))
        for scale, entry in trained.scales.items():
            statistics = PatchStatistics.of(latents, entry.coarse.resizing)
            calls = {
                "untrained": (CoarseAdapter(entry.coarse.resizing), {}),
                "start": (CoarseAdapter(entry.coarse.resizing, statistics), {}),
                "trained": (entry.coarse, entry.lora),
            }
            about = {"trained_at": trained_at, "side": side, "scale": scale, "pictures": len(latents)}
            row = {**about, **_by_level(world, latents, calls)}
            logger.info("%s", row)
            found.append(row)
    return found


def _by_level(world: World, latents: Tensor, calls: dict[str, tuple]) -> dict[str, list[float]]:
    captions = range(len(latents))
    dit = HostedDit(world.model.clone(), [world.conditioning(scene) for scene in world.scenes], latents.shape[1:])
    before = CoarseForward(dit.patcher)
    before.prepare(dit.patcher)
    options = dit.patcher.model_options["transformer_options"]
    found: dict[str, list[float]] = {name: [] for name in calls}
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad(), dit.running({}) as denoise:
        coarse = before.renewed()
        for level in LEVELS:
            noisy, sigmas = (1.0 - level) * latents + level * noise, torch.full((len(latents),), level)
            own = denoise(noisy, sigmas, captions)
            for name, (adapter, lora) in calls.items():
                call = partial(_for_captions, denoise, captions)
                clean = coarse(call, noisy, sigmas, adapter, lora, options)
                found[name].append((_size(clean - own) / _size(noisy - own)).item())
    return found


def _for_captions(denoise: Callable[..., Tensor], captions: range, noisy: Tensor, sigmas: Tensor) -> Tensor:
    return denoise(noisy, sigmas, captions)


def _size(difference: Tensor) -> Tensor:
    return difference.double().square().mean().sqrt()


def allowed(world: World, trained: TrainedPatches, trained_at: int) -> list[dict[str, Any]]:
    """Return a row per size, number of steps and remaining share of the error, and rows of plain steps."""
    found = []
    for side, steps in RUNS[trained_at].items():
        tokens = (side // TOKEN) ** 2
        operations = trained.operations_of(tokens)
        full = _latents(world, world.model, FULL, side)
        arms = [(f"plain, {steps} steps", world.model, steps, None, float(steps)) for steps in PLAIN]
        cost, name = steps - steps // 2 * (1.0 - operations[2] / operations[1]), f"DDiT, every other of {steps} steps"
        arms += [(name, less_wrong(world.model, trained, share), steps, share, cost) for share in SHARES]
        for name, model, steps, share, cost in arms:
            difference = _size(_latents(world, model, steps, side) - full) / _size(full)
            row = {
                "trained_at": trained_at, "side": side, "name": name, "steps": steps, "share": share, "plain_steps": round(cost, 2),
                "difference": difference.item(), "pictures": len(world.scenes),
            }  # fmt: skip
            logger.info("%s", row)
            found.append(row)
    return found


def _latents(world: World, model: Any, steps: int, side: int) -> Tensor:
    own, world.model = world.model, model
    positive, negative = world.conditionings(world.scenes)
    noise = comfy.sample.prepare_noise(torch.zeros(len(world.scenes), 16, side // CELL, side // CELL), SEED)
    try:
        with torch.inference_mode():
            return plain(world, "", steps, side).sample(noise, positive, negative, SEED)
    finally:
        world.model = own


def less_wrong(own: Any, trained: TrainedPatches, share: float) -> Any:
    """Return a MODEL with every other step coarse, of whose coarse calls' error only a share remains."""
    scales: list[int] = []

    def note(record: RunRecord) -> None:
        scales[:] = record.scales

    def between(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        found = executor(*args, **kwargs)
        if scales[-1] == 1 or share == 1.0:
            return found
        without = executor.original(*args, **kwargs)  # the model's own call, without any wrapper
        return without + share * (found - without)

    model = own.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "between", between)  # outermost
    return DynamicPatches(model, trained, EVERY_OTHER, note).patcher

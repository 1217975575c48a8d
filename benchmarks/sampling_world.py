"""Every way to sample with fewer operations on the demo's world, alone and together, compared at equal operations.

Operations are those of the calls that a way really makes: a hook on the model's first layer reads how many rows and tokens
each call has. So calls that a cache spares are not counted, whatever the cache.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import comfy.sample
import comfy.samplers
import ddit_world
import ralu_pictures
import torch
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.hosts.sampling import region_adaptive
from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS, solved_plan
from ralu_pictures import ASKED, CELL, CFG, SEED, SIZE, TOKEN, World
from sampling_ways import WAYS, Way
from torch import Tensor

TUNED_ON = 1  # prompts whose runs choose the threshold of a decision
TUNINGS = 6
LOWEST_TAU, HIGHEST_TAU = 1e-3, 1e2
logger = logging.getLogger("__main__")


@dataclass
class Made:
    """What a way has made.

    Attributes:
        pictures: (B, 3, H, W).
        calls: Rows that entered the model, by their number of image tokens.
        plain_steps: Their operations, in plain steps of one picture with guidance.
        tau: The threshold of a decision while sampling; 0 without one.
    """

    pictures: Tensor
    calls: dict[int, int]
    plain_steps: float
    tau: float = 0.0


@contextmanager
def counted_calls(world: World) -> Iterator[dict[int, int]]:
    """Count the rows that enter the model by their number of image tokens."""
    rows: dict[int, int] = {}

    def entered(_: Any, arguments: tuple) -> None:
        number, tokens = arguments[0].shape[:2]
        rows[tokens] = rows.get(tokens, 0) + number

    hook = world.model.model.diffusion_model.img_in.register_forward_pre_hook(entered)
    try:
        yield rows
    finally:
        hook.remove()


def plain_steps(
    world: World, way: Way, rows: dict[int, int], trained: TrainedPatches, pictures: int, side: int
) -> float:
    """Return the operations of counted rows, in plain steps of one picture with guidance.

    RALU's first stage has as many tokens as a coarse call; only one of the two is in a way.
    """
    own = (side // TOKEN) ** 2
    coarse = {own // scale**2: operations for scale, operations in trained.operations_of(own).items()}
    known = coarse if way.has_coarse_steps and way.stage != "last" else {}
    total = sum(number * known.get(tokens, world.operations(tokens)) for tokens, number in rows.items())
    if way.stage == "last":  # its coarse calls have as many tokens as RALU's first stage, and the adapters' products
        late = rows[own // 4] - 2 * pictures * PRESETS[way.preset].steps[0]
        total += late * (coarse[own // 4] - world.operations(own // 4))
    return total / (2 * pictures * world.operations(own))


def sampled(world: World, trained: TrainedPatches, way: Way, side: int, tau: float | None = None) -> Made:
    """Return a way's pictures of all prompts; its threshold is found first, unless given."""
    if way.decides and tau is None:
        tau = tuned(world, trained, way, side)
    own, tokens = world.model, (side // TOKEN) ** 2
    plan = way.plan(trained, ddit_world.sigmas_of(world, way.steps), tokens, tau or 0.0)
    try:
        world.model = way.model(own, trained, plan)
        sample = _arm(world, way, side)  # before calls are counted, because it counts operations by a call of its own
        with torch.inference_mode(), counted_calls(world) as calls:
            pictures = _pictures(world, sample, side, 1 if way.decides else len(world.scenes))
    finally:
        world.model = own
    cost = plain_steps(world, way, calls, trained, len(pictures), side)
    return Made(pictures, dict(sorted(calls.items())), cost, tau or 0.0)


def tuned(world: World, trained: TrainedPatches, way: Way, side: int) -> float:
    """Return the threshold at which the first prompts' pictures cost what the way should, by bisection."""
    scenes, low, high = world.scenes, math.log(LOWEST_TAU), math.log(HIGHEST_TAU)
    world.scenes = scenes[:TUNED_ON]
    found: list[tuple[float, float]] = []
    try:
        for _ in range(TUNINGS):
            middle = 0.5 * (low + high)
            cost = sampled(world, trained, way, side, math.exp(middle)).plain_steps
            found.append((abs(cost - way.work), math.exp(middle)))
            low, high = (middle, high) if cost > way.work else (low, middle)
    finally:
        world.scenes = scenes
    return min(found)[1]


def _arm(world: World, way: Way, side: int) -> Callable[..., Tensor]:
    """Return (noise, positive, negative, seed) -> latents."""
    if way.stage == "first":
        return _without_a_smaller_picture(world, way)
    if way.stage == "last":
        return _with_coarse_steps(ralu_pictures.staged(world, way.preset, 0.2, side).sample)
    if way.preset:
        return ralu_pictures.staged(world, way.preset, 0.2, side).sample
    return ralu_pictures.plain(world, "", way.steps, side).sample


def _with_coarse_steps(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return RALU with a sampler that Dynamic Patches takes; the nodes refuse RALU's own, which it does not know by name."""
    named = type("euler", (region_adaptive.EulerFrom,), {})

    def renamed(*given: Any) -> Tensor:
        with mock.patch.object(region_adaptive, "EulerFrom", named):
            return sample(*given)

    return renamed


def _without_a_smaller_picture(world: World, way: Way) -> Callable[..., Tensor]:
    """Return sampling with the levels of a preset's first stage, and from there to the end on the ordinary schedule."""
    first = list(PRESETS[way.preset].sigmas[0])
    (schedule,) = (torch.tensor(levels) for levels in solved_plan((1000,), (1.0,)).sigmas)
    rest = schedule[schedule < first[-1]]
    later = rest[torch.linspace(0, len(rest) - 1, way.steps - len(first) + 2).round().long()[1:]]
    sigmas = torch.cat([torch.tensor(first), later]).float()

    def sample(noise: Tensor, positive: list, negative: list, seed: int) -> Tensor:
        return comfy.sample.sample_custom(
            world.model, noise, CFG, comfy.samplers.sampler_object("euler"), sigmas, positive, negative,
            torch.zeros_like(noise), disable_pbar=True, seed=seed,
        )  # fmt: skip

    return sample


def _pictures(world: World, sample: Callable[..., Tensor], side: int, batch: int) -> Tensor:
    """Return pictures of all prompts; a picture's noise does not depend on the batch."""
    noise = comfy.sample.prepare_noise(torch.zeros(len(world.scenes), 16, side // CELL, side // CELL), SEED)
    made = []
    for start in range(0, len(world.scenes), batch):
        positive, negative = world.conditionings(world.scenes[start : start + batch])
        latent = sample(noise[start : start + batch], positive, negative, SEED)
        made.append(world.vae.decode(latent).permute(0, 3, 1, 2).clamp(0, 1).float())
    return torch.cat(made)


def rows(world: World, trained: TrainedPatches, side: int, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield a row per way for pictures of ``side`` pixels, without the ways in ``done``."""
    drawn, full = world.drawn(), None
    missing = [way for way in WAYS if way.name not in done]
    for way in (WAYS[0], *(way for way in missing if way is not WAYS[0])) if missing else ():
        started = time.perf_counter()
        made = sampled(world, trained, way, side)
        full = made.pictures if full is None else full
        row = {
            "side": side, "name": way.name, "steps": way.steps, "tau": made.tau,
            "calls": {str(tokens): number for tokens, number in made.calls.items()},
            "plain_steps": round(made.plain_steps, 2), "prompts": len(drawn),
            "seconds": round(time.perf_counter() - started, 1), **judged(world, made.pictures, drawn, full),
        }  # fmt: skip
        logger.info("%s", {key: value for key, value in row.items() if not isinstance(value, list)})
        if way in missing:
            yield row


def judged(world: World, pictures: Tensor, drawn: Tensor, full: Tensor) -> dict[str, Any]:
    """Return likeness to the drawings, right answers, and the difference from other pictures; also picture by picture."""
    seen = torch.nn.functional.interpolate(pictures, size=(SIZE, SIZE), mode="area")  # the reader knows this size
    likeness = world.reading.similarity(world.reader, seen, drawn)
    apart = (pictures - full).square().flatten(1).mean(1)
    answers = zip(world.reading.read(world.reader, seen), world.scenes, strict=True)
    right = [answer[name] == getattr(scene, name) for answer, scene in answers for name in ASKED]
    return {
        "likeness": likeness.mean().item(), "likeness_error": (likeness.std() / len(likeness) ** 0.5).item(),
        "right": sum(right) / len(right), "from_full": apart.mean().sqrt().item(),
        "likeness_each": [round(value, 4) for value in likeness.tolist()],
        "from_full_each": [round(value, 4) for value in apart.sqrt().tolist()],
    }  # fmt: skip

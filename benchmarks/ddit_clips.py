"""Dynamic patches on clips: a small Wan, adapters trained on clips that it samples, and clips at equal operations.

Compared are the final latents with those of ``FULL`` plain steps from the same noise, and the movement with the prompt's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import clip_model
import clip_world
import comfy.sample
import ddit_world
import torch
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.ddit.plans import ErrorBudget, EveryOther, PatchPlan
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches, RunRecord
from blockskip_pack.blockskip_core.hosts.sampling.own_latents import OwnLatents
from blockskip_pack.blockskip_core.hosts.sampling.patch_training import PatchTraining, train_patches
from clip_world import CELL, FRAMES, SEEN, SIDE, UNSEEN
from torch import Tensor

FULL = 50
WORK = (25, 17, 10)  # plain steps: 1/2, 1/3 and 1/5 of all
FEWER = (7, 5)
CFG, SEED, REPEATS = 3.0, 100, 1  # clips of every prompt
SCALE = 2
TRAIN_PROMPTS, TRAIN_STEPS, TRAIN_BATCH, TRAIN_RATE = 40, 100, 8, 7e-4
RANK = 16  # 32 would be half of the model's width
CELL_PIXELS = 8  # a latent's cell, as the host knows it of Wan's autoencoder
logger = logging.getLogger("__main__")


def rows(steps: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Train the model and the adapters, and yield the parts of the report.

    Args:
        steps: Training steps of the model.
    """
    model = clip_model.build()
    size = {"side": SIDE, "frames": FRAMES, "tokens": FRAMES * (SIDE // CELL // 2) ** 2}
    yield "the small Wan", [{**clip_model.train(model, steps), **size}]
    trained, about = adapters(model)
    yield "training, clips", [about]
    yield "clips", compared(model, trained)


def adapters(model: Any) -> tuple[TrainedPatches, dict[str, Any]]:
    """Train adapters on clips that the model samples; also return the row of the report."""
    prompts = [clip_world.conditioning([scene]) for scene in SEEN[:TRAIN_PROMPTS]]
    settings = DistillationSettings(
        steps=TRAIN_STEPS, batch_size=TRAIN_BATCH, learning_rate=TRAIN_RATE, validate_every=25
    )
    side = SIDE // CELL * CELL_PIXELS
    latents = OwnLatents(per_prompt=1, width=side, height=side, cfg=CFG, frames=clip_world.PICTURES)
    lora = LoraSettings(rank=RANK, alpha=float(RANK), targets="mlp")
    request = PatchTraining(scales=(SCALE,), latents=latents, settings=settings, lora=lora, checkpointing=False)
    results, started = {}, time.process_time()

    def seen(scale: int, result: DistillationResult) -> None:
        results[scale] = result

    with torch.inference_mode():  # as nodes run
        trained = train_patches(model, prompts, [clip_world.conditioning([None])], request, lambda *_: None, seen)
    row = ddit_world.trained_row(SIDE, SCALE, results[SCALE])
    return trained, {**row, "prompts": len(prompts), "rank": RANK, "seconds": round(time.process_time() - started)}


def ways(trained: TrainedPatches, operations: dict[int, float], model: Any) -> list[tuple[str, int, PatchPlan | None]]:
    """Return (name, steps, plan): plain steps, then coarse steps that cost as much as some of them."""
    found: list[tuple[str, int, PatchPlan | None]] = [
        (f"plain, {steps} steps", steps, None) for steps in (FULL, *WORK, *FEWER)
    ]
    tables = {scale: entry.errors for scale, entry in trained.scales.items()}
    sampling = model.get_model_object("model_sampling")
    for work in WORK:
        steps = equal_steps(work, operations[SCALE] / operations[1])
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()
        within = ddit_world.budget_at(sigmas, tables, operations, work)
        found += [
            (f"every other of {steps} steps", steps, EveryOther(SCALE, last_own=0)),
            (f"by error, {steps} steps", steps, ErrorBudget(within, tables, trained.operations_of)),
        ]
    return found


def equal_steps(work: float, coarse: float) -> int:
    """Return of how many steps every other must be coarse to cost as much as so many plain steps.

    Args:
        work: Plain steps.
        coarse: What a coarse step costs, in plain steps.
    """
    return min(range(1, round(4 * work)), key=lambda steps: abs(steps - steps // 2 * (1.0 - coarse) - work))


def compared(model: Any, trained: TrainedPatches) -> list[dict[str, Any]]:
    """Return a row per way: operations, difference from plain ``FULL`` steps, and how many clips move as their prompts say."""
    scenes = [scene for scene in UNSEEN for _ in range(REPEATS)]
    operations = trained.operations_of(trained.notes["image_tokens"])
    found, full = [], None
    for name, steps, plan in ways(trained, operations, model):
        started = time.process_time()
        latents, scales = sampled(model, trained, scenes, steps, plan)
        full = latents if full is None else full
        apart = (latents - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        clips = clip_world.to_clips(latents)
        moves = [clip_world.direction_of(clip) == scene.direction for clip, scene in zip(clips, scenes, strict=True)]
        found.append({
            "name": name, "steps": steps, "scales": "".join(map(str, scales)), "clips": len(scenes),
            "plain_steps": round(sum(operations[scale] for scale in scales) / operations[1], 2),
            "difference": apart.mean().item(), "difference_each": [round(value, 4) for value in apart.tolist()],
            "moves": sum(moves) / len(moves), "seconds": round(time.process_time() - started, 1),
        })  # fmt: skip
        logger.info("%s", {key: value for key, value in found[-1].items() if key != "difference_each"})
    return found


def sampled(
    model: Any, trained: TrainedPatches, scenes: list[clip_world.Scene], steps: int, plan: PatchPlan | None
) -> tuple[Tensor, list[int]]:
    """Return latents as the model has them, (B, C, F, H, W), and the patch size of every step."""
    scales = [1] * steps

    def note(record: RunRecord) -> None:
        scales[:] = record.scales

    own = model if plan is None else DynamicPatches(model, trained, plan, note).patcher
    cells = SIDE // CELL
    empty = torch.zeros(len(scenes), CELL**2, FRAMES, cells, cells)
    against = clip_world.conditioning([None] * len(scenes))
    with torch.inference_mode():
        latents = comfy.sample.sample(
            own, comfy.sample.prepare_noise(empty, SEED), steps, CFG, "euler", "simple", clip_world.conditioning(scenes),
            against, empty, seed=SEED, disable_pbar=True,
        )  # fmt: skip
    return model.model.process_latent_in(latents), scales

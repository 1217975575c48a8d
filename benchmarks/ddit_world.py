"""Dynamic patches on the demo's world: adapters trained on its model, and pictures at equal operations."""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from blockskip_pack.blockskip_core.ddit.coarse_levels import CoarseSteps
from blockskip_pack.blockskip_core.ddit.plans import DecidedWhileSampling, ErrorBudget, PatchPlan, TypedWindows
from blockskip_pack.blockskip_core.ddit.scheduler import SchedulerSettings
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.ddit.windows import scales_within_budget
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings
from blockskip_pack.blockskip_core.files import open_tensors, write_atomically
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches, RunRecord
from blockskip_pack.blockskip_core.hosts.sampling.own_latents import OwnLatents
from blockskip_pack.blockskip_core.hosts.sampling.patch_training import GivenPictures, PatchTraining, train_patches
from ralu_pictures import ASKED, BATCH, CELL, CFG, PATCH, SEED, World
from safetensors.torch import save_file
from torch import Tensor

READ_AT = 256  # pixels; the reader knows this size
SCALES = (2,)
TRAIN_BATCH, TRAIN_RATE = 8, 7e-4
AUTO_STEPS = 20
WINDOW_STEPS = 12
WINDOWS = {  # six coarse steps of twelve, about eight plain steps of work
    "early window": "2-7: 2",
    "middle window": "4-9: 2",
    "late window": "6-11: 2",
    "every other step": "2: 2, 4: 2, 6: 2, 8: 2, 10: 2, 11: 2",
}
logger = logging.getLogger("__main__")


def kept_or_trained(
    world: World, options: argparse.Namespace, side: int, scales: tuple[int, ...] = SCALES
) -> tuple[TrainedPatches, list[dict[str, Any]]]:
    """Return adapters from ``--keep``, or train them and keep them there; also the report's rows of a training.

    Args:
        world: The world.
        options: With ``keep``, ``train_steps`` and ``train_prompts`` (``command_line.of_adapters``).
        side: Of the training's pictures in pixels.
        scales: Patch sizes.
    """
    if options.keep and options.keep.is_file():
        return load(options.keep), []
    trained, rows = train(world, side, options.train_steps, options.train_prompts, scales)
    if options.keep:
        save(trained, options.keep)
    return trained, rows


def described(trained: TrainedPatches) -> list[dict[str, Any]]:
    """Return what adapters say of their own training, a row per patch size."""
    return [
        {
            "scale": scale, "side": trained.notes["width"], "prompts": trained.notes["prompts"], "steps": entry.steps,
            "batch": TRAIN_BATCH, "rate": TRAIN_RATE, "untrained": entry.fallback.errors, "trained": entry.errors.errors,
        }
        for scale, entry in trained.scales.items()
    ]  # fmt: skip


def train(
    world: World,
    side: int,
    steps: int,
    prompts: int,
    scales: tuple[int, ...] = SCALES,
    coarse: CoarseSteps | None = None,
) -> tuple[TrainedPatches, list[dict[str, Any]]]:
    """Train adapters on pictures that the world draws; also return the rows of the report.

    Args:
        world, side, scales: See :func:`kept_or_trained`.
        steps, prompts: Of the training.
        coarse: Steps whose noise levels alone are trained on; None for all levels.
    """
    rng = random.Random("ddit/training")
    scenes = [world.drawing.random_scene(rng) for _ in range(prompts)]
    captions = [world.conditioning(scene) for scene in scenes]
    pictures = [torch.from_numpy(np.array(world.drawing.render(scene, side))).float() / 255 for scene in scenes]
    settings = DistillationSettings(
        steps=steps, batch_size=TRAIN_BATCH, learning_rate=TRAIN_RATE, validate_every=25, patience=4
    )
    latents = OwnLatents(per_prompt=1, width=side, height=side)
    request = PatchTraining(scales=scales, latents=latents, settings=settings, checkpointing=False, coarse=coarse)
    last, results, started = [0.0], {}, time.perf_counter()

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        if time.perf_counter() - last[0] > 30.0:
            last[0] = time.perf_counter()
            logger.info("%s %d of %d %s", phase, done, total, detail)

    def seen(scale: int, result: DistillationResult) -> None:
        results[scale] = result

    given = GivenPictures(pictures, world.vae)
    with torch.inference_mode():  # as nodes run; the VAE would keep its activations otherwise
        trained = train_patches(world.model, captions, [world.negative], request, progress, seen, given)
    seconds = round(time.perf_counter() - started)
    more = {"prompts": prompts, "batch": TRAIN_BATCH, "rate": TRAIN_RATE, "seconds": seconds}
    return trained, [{**trained_row(side, scale, result), **more} for scale, result in results.items()]


def trained_row(side: int, scale: int, result: DistillationResult) -> dict[str, Any]:
    """Return the report's row of one patch size's training, on pictures of ``side`` pixels."""
    return {
        "side": side, "scale": scale, "steps": result.steps, "best_step": result.best_step,
        "untrained": result.untrained, "start": result.measured[0][1], "trained": result.best_errors,
        "measured": [(step, sum(errors) / len(errors)) for step, errors in result.measured],
    }  # fmt: skip


def save(trained: TrainedPatches, path: Path) -> None:
    """Keep adapters for the next run of the benchmark."""
    import json

    about = {"about": json.dumps(trained.description())}
    write_atomically(path, lambda temporary: save_file(trained.tensors(), temporary, metadata=about))


def load(path: Path) -> TrainedPatches:
    """Read adapters that :func:`save` has written."""
    import json

    with open_tensors(path) as file:
        return TrainedPatches.read(
            {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["about"])
        )


@dataclass
class Arm:
    """One way of sampling.

    Attributes:
        name: Readable name.
        steps: Steps of the sampler.
        plan: Which steps are coarse; None for plain sampling.
        scales: Of every step of the last run.
    """

    name: str
    steps: int
    plan: PatchPlan | None = None
    scales: list[int] = field(default_factory=list)

    def sample(self, world: World, trained: TrainedPatches, noise: Tensor, positive: list, negative: list) -> Tensor:
        """Return latents."""
        model = world.model
        if self.plan is not None:
            model = DynamicPatches(model, trained, self.plan, self._note).patcher
        return comfy.sample.sample(
            model, noise, self.steps, CFG, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=SEED,
            disable_pbar=True,
        )  # fmt: skip

    def _note(self, record: RunRecord) -> None:
        self.scales = list(record.scales)


def sigmas_of(world: World, steps: int) -> list[float]:
    """Return the noise levels of a run."""
    sampling = world.model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()


def arms(
    world: World, trained: TrainedPatches, operations: dict[int, float], budgets: Sequence[int], full_steps: int
) -> list[Arm]:
    """Return plain sampling at every budget, schedules by error at the same operations, and decisions while sampling."""
    found = [Arm("plain", full_steps)]
    tables = {scale: entry.errors for scale, entry in trained.scales.items()}
    for budget in budgets:
        found.append(Arm("plain", budget))
        for steps in (round(1.5 * budget), 2 * budget):
            within = budget_at(sigmas_of(world, steps), tables, operations, budget)
            found.append(
                Arm(
                    f"by error, {budget} plain steps of work",
                    steps,
                    ErrorBudget(within, tables, lambda tokens: operations),
                )
            )
    for name, windows in WINDOWS.items():
        found.append(Arm(name, WINDOW_STEPS, TypedWindows(windows, SCALES)))
    sides = {scale: entry.coarse.resizing.side for scale, entry in trained.scales.items()}
    for criterion in ("third difference", "third difference (as published)"):
        plan = DecidedWhileSampling(SchedulerSettings(criterion=criterion), sides)
        found.append(Arm(f"{criterion}, tau 0.001", AUTO_STEPS, plan))
    return found


def budget_at(sigmas: Sequence[float], tables: dict, operations: dict[int, float], plain_steps: float) -> float:
    """Return the least error budget whose schedule costs no more than so many plain steps."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = 0.5 * (low + high)
        scales = scales_within_budget(sigmas, tables, operations, middle)
        if sum(operations[scale] for scale in scales) <= plain_steps * operations[1]:
            high = middle
        else:
            low = middle
    return high


def pictures_of(world: World, trained: TrainedPatches, arm: Arm, side: int) -> Tensor:
    """Return pictures of all prompts at the side that the reader knows, (B, 3, H, W)."""
    made = []
    for start in range(0, len(world.scenes), BATCH):
        scenes = world.scenes[start : start + BATCH]
        positive, negative = world.conditionings(scenes)
        empty = torch.zeros(len(scenes), 16, side // CELL, side // CELL)
        noise = comfy.sample.prepare_noise(empty, SEED + start)
        latent = arm.sample(world, trained, noise, positive, negative)
        pictures = world.vae.decode(latent).permute(0, 3, 1, 2).clamp(0, 1).float()
        made.append(torch.nn.functional.interpolate(pictures, size=(READ_AT, READ_AT), mode="area"))
    return torch.cat(made)


def rows(
    world: World, trained: TrainedPatches, side: int, budgets: Sequence[int], full_steps: int
) -> list[dict[str, Any]]:
    """Return a row per arm: operations in plain steps, likeness to the prompt, and right answers of the reader.

    The first arm, plain sampling with ``full_steps``, is what the others' pictures are compared with.
    """
    tokens = (side // (CELL * PATCH)) ** 2
    operations = trained.operations_of(tokens)
    drawn, reference, found = world.drawn(), None, []
    for arm in arms(world, trained, operations, budgets, full_steps):
        started = time.perf_counter()
        with torch.inference_mode():
            pictures = pictures_of(world, trained, arm, side)
            likeness = world.reading.similarity(world.reader, pictures, drawn)
            answers = world.reading.read(world.reader, pictures)
        reference = pictures if reference is None else reference
        scales = arm.scales or [1] * arm.steps
        right = [
            sum(a[name] == getattr(s, name) for a, s in zip(answers, world.scenes, strict=True)) / len(answers)
            for name in ASKED
        ]
        found.append({
            "side": side, "name": arm.name, "steps": arm.steps, "scales": "".join(map(str, scales)),
            "plain_steps": round(sum(operations[scale] for scale in scales) / operations[1], 2),
            "likeness": likeness.mean().item(), "likeness_error": (likeness.std() / len(likeness) ** 0.5).item(),
            "right": sum(right) / len(right), "from_full": (pictures - reference).square().mean().sqrt().item(),
            "prompts": len(drawn), "seconds": round(time.perf_counter() - started, 1),
        })  # fmt: skip
        logger.info("%s", found[-1])
    return found

"""Pictures of the demo's world: plain sampling, the stages with equal operations, and naive upsampling as a control."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.hosts.sampling.early_regions import RegionChoice
from blockskip_pack.blockskip_core.hosts.sampling.region_adaptive import EulerFrom, RegionAdaptiveSampler
from blockskip_pack.blockskip_core.ralu.regions import edge_scores
from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS, solved_plan
from blockskip_pack.blockskip_core.ralu.token_grid import upsampled
from PIL import Image
from torch import Tensor

SIZE, CELL, PATCH = 256, 8, 2
CFG, SEED, BATCH = 4.0, 100, 10
ASKED = ("shape", "colour", "ground", "place", "size", "finish")
TOKEN = CELL * PATCH  # pixels of a fine token
SHOWN = 128  # pixels of a picture on the sheet
logger = logging.getLogger("__main__")


class World:
    """The demo's model, its reader, and prompts that are not in its training pictures."""

    def __init__(self, assets: Path, prompts: int) -> None:
        import evaluate_world
        import host
        import sample_world
        import world
        import world_reader

        self.reading, self.drawing = world_reader, world
        self.model, self.clip, self.vae = sample_world.load_world(assets)
        self.reader = world_reader.load_reader(assets / host.READER_FILE)
        self.scenes = evaluate_world.held_out_scenes(prompts)
        self._encode = lambda text: sample_world.encode(self.clip, text)
        self._joined = evaluate_world.joined
        self.negative = self._encode("")
        self._weightless = WeightlessDit.of(
            HostedDit(self.model, [self.conditioning(self.scenes[0])], (16, PATCH, PATCH))
        )

    def conditioning(self, scene: Any) -> list:
        """Return the CONDITIONING of a scene's caption."""
        return self._encode(self.drawing.caption(scene))

    def encoded(self, pictures: Tensor) -> Tensor:
        """Return latents of pictures (B, 3, H, W) in the model's own scale."""
        with torch.no_grad():
            return self.model.model.process_latent_in(self.vae.encode(pictures.movedim(1, -1))).float()

    def conditionings(self, scenes: list) -> tuple[list, list]:
        """Return the positive conditioning, one row per picture, and the negative one."""
        return self._joined([self.conditioning(scene) for scene in scenes]), self.negative

    def operations(self, tokens: int) -> int:
        """Count the operations of the model's forward on ``tokens`` image tokens."""
        noisy = torch.empty(1, 16, PATCH, tokens * PATCH, device="meta")
        with torch.no_grad(), self._weightless.running({}) as denoise, Counting() as counting:
            denoise(noisy, torch.empty(1, device="meta"), [0])
        return counting.operations

    def drawn(self, side: int = SIZE) -> Tensor:
        """Return pictures of the prompts drawn by the world, shape (B, 3, side, side)."""
        pictures = [np.array(self.drawing.render(scene, side)) for scene in self.scenes]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Attributes:
        name: Readable name.
        steps: Number of sampler steps.
        operations: Operations of all its forwards, for one picture without guidance.
        sample: (noise, positive, negative, seed) -> latents.
    """

    name: str
    steps: int
    operations: int
    sample: Callable[[Tensor, list, list, int], Tensor]


def arms(world: World, full_steps: int) -> list[Arm]:
    """Return all arms; plain sampling at equal operations is rounded up to a whole step."""
    found = [plain(world, "plain", full_steps)]
    for preset in ("FLUX 5x", "FLUX 7x"):
        stages = staged(world, preset, 0.2)
        equal = -(-stages.operations // world.operations((SIZE // TOKEN) ** 2))
        found += [stages, plain(world, f"plain, at the operations of {preset}", equal)]
    return [*found, staged(world, "FLUX 5x", 0.0), naive(world, "FLUX 5x")]


def plain(world: World, name: str, steps: int, side: int = SIZE) -> Arm:
    """Return the arm with Euler on the model's ordinary schedule, for pictures of ``side`` pixels."""

    def sample(noise: Tensor, positive: list, negative: list, seed: int) -> Tensor:
        return comfy.sample.sample(
            world.model, noise, steps, CFG, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=seed,
            disable_pbar=True,
        )  # fmt: skip

    return Arm(f"{name}, {steps} steps", steps, steps * world.operations((side // TOKEN) ** 2), sample)


def staged(world: World, preset: str, ratio: float, side: int = SIZE) -> Arm:
    """Return the arm with the three stages, for pictures of ``side`` pixels."""
    plan, coarse = PRESETS[preset], (side // TOKEN // 2) ** 2
    tokens = (coarse, coarse + 3 * int(coarse * ratio), 4 * coarse)

    def sample(noise: Tensor, positive: list, negative: list, seed: int) -> Tensor:
        sampler = RegionAdaptiveSampler(world.model, plan, RegionChoice(method="edges", ratio=ratio, vae=world.vae))
        return sampler.sample(positive, negative, CFG, torch.zeros_like(noise), seed).latent

    operations = sum(steps * world.operations(number) for steps, number in zip(plan.steps, tokens, strict=True))
    early = f"share {ratio}" if ratio else "no early regions"
    return Arm(f"RALU, {preset}, {early}", sum(plan.steps), operations, sample)


def naive(world: World, preset: str) -> Arm:
    """Return the control: after the same first stage all tokens are copied, and sampling continues without noise."""
    plan, coarse = PRESETS[preset], (SIZE // TOKEN // 2) ** 2
    later = sum(plan.steps[1:])
    (schedule,) = solved_plan((1000,), (1.0,)).sigmas
    rest = torch.tensor(schedule)[torch.tensor(schedule) <= plan.sigmas[0][-1]]
    rest = rest[torch.linspace(0, len(rest) - 1, later + 1).round().long()]

    def sample(noise: Tensor, positive: list, negative: list, seed: int) -> Tensor:
        first, second = EulerFrom(None), None
        for sampler, sigmas, own in ((first, plan.sigmas[0], noise[..., ::2, ::2]), (second, rest, noise)):
            sampler = sampler or EulerFrom(upsampled(first.state, PATCH))
            latent = comfy.sample.sample_custom(
                world.model, own.contiguous(), CFG, sampler, torch.FloatTensor(sigmas), positive, negative,
                torch.zeros_like(own), callback=lambda *_: None, disable_pbar=True, seed=seed,
            )  # fmt: skip
        return latent

    operations = plan.steps[0] * world.operations(coarse) + later * world.operations(4 * coarse)
    return Arm("naive upsampling after the first stage of FLUX 5x", plan.steps[0] + later, operations, sample)


def pictures_of(world: World, arm: Arm, side: int = SIZE) -> Tensor:
    """Return pictures of all prompts, shape (B, 3, side, side)."""
    made = []
    for start in range(0, len(world.scenes), BATCH):
        scenes = world.scenes[start : start + BATCH]
        positive, negative = world.conditionings(scenes)
        empty = torch.zeros(len(scenes), 16, side // CELL, side // CELL)
        seed = SEED + start
        latent = arm.sample(comfy.sample.prepare_noise(empty, seed), positive, negative, seed)
        made.append(world.vae.decode(latent).permute(0, 3, 1, 2).clamp(0, 1).float())
    return torch.cat(made)


def measures(world: World, pictures: Tensor, drawn: Tensor) -> dict[str, float]:
    """Return the share of right answers, likeness to the prompt, edges, and steps at the borders of tokens."""
    answers = world.reading.read(world.reader, pictures)
    right = {
        name: sum(a[name] == getattr(s, name) for a, s in zip(answers, world.scenes, strict=True)) / len(answers)
        for name in ASKED
    }
    likeness = world.reading.similarity(world.reader, pictures, drawn).mean().item()
    edges = edge_scores(pictures.movedim(1, -1), (SIZE // TOKEN, SIZE // TOKEN)).mean().item()
    return {**right, "likeness": likeness, "edges": edges, "borders": border_contrast(pictures)}


def border_contrast(pictures: Tensor) -> float:
    """Return how much larger pixel steps are at the borders of tokens than elsewhere; 1 means equal."""
    found = []
    for dim in (-1, -2):
        steps = pictures.diff(dim=dim).abs().mean((0, 1, 3 + (dim == -1) * -1))
        at_border = torch.arange(1, SIZE) % TOKEN == 0
        found.append(steps[at_border].mean() / steps[~at_border].mean())
    return float(sum(found) / 2)


def rows(world: World, full_steps: int, sheet: Path) -> list[dict[str, Any]]:
    """Return rows of every arm and of the world's own drawings of the prompts; also write the sheet of pictures."""
    drawn = world.drawn()
    shown = [("what the prompts mean, drawn", drawn)]
    found = [{"name": shown[0][0], "steps": 0, "operations": 0, "seconds": 0.0, **measures(world, drawn, drawn)}]
    with torch.inference_mode():
        for arm in arms(world, full_steps):
            start = time.perf_counter()
            pictures = pictures_of(world, arm)
            seconds = time.perf_counter() - start
            own = {"name": arm.name, "steps": arm.steps, "operations": arm.operations, "seconds": round(seconds, 1)}
            found.append({**own, **measures(world, pictures, drawn)})
            shown.append((arm.name, pictures))
            logger.info("%s: %.0f s, likeness %.3f", arm.name, seconds, found[-1]["likeness"])
    side_by_side(shown).save(sheet, quality=85)
    return [{"prompts": len(drawn), **row} for row in found]


def rows_with_cache(world: World) -> list[dict[str, Any]]:
    """Return rows of FLUX 5x and plain sampling with core's EasyCache: number of model calls, and measures.

    In bfloat16, because in float32 that cache writes into its caller's latent, staged or not.
    """
    from comfy_extras.nodes_easycache import EasyCacheNode

    own, drawn, found = world.model, world.drawn(), []
    in_bfloat16 = own.clone()
    in_bfloat16.set_model_compute_dtype(torch.bfloat16)
    try:
        for threshold in (0.0, 0.1, 0.2, 0.3):
            world.model = (
                EasyCacheNode.execute(in_bfloat16, threshold, 0.15, 0.95, False)[0] if threshold else in_bfloat16
            )
            for arm in (staged(world, "FLUX 5x", 0.2), plain(world, "plain", 15)):
                calls: list[int] = []
                entrance = world.model.model.diffusion_model.img_in
                handle = entrance.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].shape[1]))
                with torch.inference_mode():
                    pictures = pictures_of(world, arm)
                handle.remove()
                batches = -(-len(world.scenes) // BATCH)
                per_stage = [calls.count(tokens) / batches for tokens in sorted(set(calls))]
                row = {"name": arm.name, "threshold": threshold, "steps": arm.steps, "calls": per_stage}
                found.append({**row, "prompts": len(drawn), **measures(world, pictures, drawn)})
                logger.info("%s, threshold %s: %s", arm.name, threshold, per_stage)
    finally:
        world.model = own
    return found


def side_by_side(shown: list[tuple[str, Tensor]]) -> Image.Image:
    """Return a sheet with one row of pictures per arm, and its name above."""
    from PIL import ImageDraw

    label = 16
    columns = len(shown[0][1])
    canvas = Image.new("RGB", (columns * SHOWN, len(shown) * (SHOWN + label)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (name, pictures) in enumerate(shown):
        top = row * (SHOWN + label)
        pen.text((2, top + 2), name, fill="black")
        for column, picture in enumerate(pictures):
            values = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(values).resize((SHOWN, SHOWN), Image.LANCZOS), (column * SHOWN, top + label))
    return canvas


def panel(world: World, target: Path) -> None:
    """Draw the help page's picture: early regions, RALU, and plain sampling at 50 steps; one column per prompt."""
    positive, negative = world.conditionings(world.scenes)
    empty = torch.zeros(len(world.scenes), 16, SIZE // CELL, SIZE // CELL)
    choice = RegionChoice(method="edges", ratio=0.2, vae=world.vae)
    with torch.inference_mode():
        sampler = RegionAdaptiveSampler(world.model, PRESETS["FLUX 5x"], choice)
        sampled = sampler.sample(positive, negative, CFG, empty, SEED)
        full = plain(world, "plain", 50).sample(comfy.sample.prepare_noise(empty, SEED), positive, negative, SEED)
        fast, slow = (world.vae.decode(latent).clamp(0, 1) for latent in (sampled.latent, full))
    shown = torch.cat([torch.cat(list(row), dim=1) for row in (sampled.overlay, fast, slow)])
    drawn = Image.fromarray((shown * 255).round().to(torch.uint8).numpy())
    drawn = drawn.resize((drawn.width * 3 // 4, drawn.height * 3 // 4), Image.LANCZOS)
    drawn.quantize(160, dither=Image.Dither.NONE).save(target, optimize=True)

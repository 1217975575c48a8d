"""Read the model's samples back: how often are shape, colour, ground and place what the caption says?

    python evaluate_world.py --comfyui FOLDER [--count 200] [--size 256] [--sheet samples.png]

The captions are in none of the training pictures. Sampling is ComfyUI's own; the judge is the shipped reader.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

import host
import world
import world_reader
from sample_world import encode, load_world, sheet, to_picture
from train_world import held_out_scenes

logger = logging.getLogger("evaluate_world")
ASKED = ("shape", "colour", "ground", "place", "size", "finish")
BAR, BARRED = 0.9, ("shape", "colour", "ground", "place")
BATCH = 20


def sample_batch(
    parts: tuple, scenes: list[world.Scene], options: argparse.Namespace, seed: int
) -> torch.Tensor:
    """One picture per scene, ``[B, 3, H, W]`` in [0, 1], sampled together by ComfyUI's Euler sampler."""
    import comfy.sample

    model, clip, vae = parts
    empty = torch.zeros(len(scenes), 16, options.size // 8, options.size // 8)
    noise = comfy.sample.prepare_noise(empty, seed)
    negative = encode(clip, "")
    positive = joined([encode(clip, world.caption(scene)) for scene in scenes])
    latent = comfy.sample.sample(
        model, noise, options.steps, options.cfg, "euler", "simple", positive, negative, empty,
        seed=seed, disable_pbar=True,
    )  # fmt: skip
    return vae.decode(latent).permute(0, 3, 1, 2).clamp(0, 1)


def joined(conditionings: list[list]) -> list[list[Any]]:
    """Conditionings of one row each as one of many rows, a caption per picture."""
    tokens = torch.cat([one[0][0] for one in conditionings])
    pooled = torch.cat([one[0][1]["pooled_output"] for one in conditionings])
    return [[tokens, {**conditionings[0][0][1], "pooled_output": pooled}]]


def evaluate(options: argparse.Namespace) -> dict[str, float]:
    """Share of right answers per question; also writes the sheet of the first pictures."""
    parts = load_world(options.assets)
    reader = world_reader.load_reader(options.assets / host.READER_FILE)
    scenes = held_out_scenes(options.count)
    right: dict[str, list[bool]] = {name: [] for name in ASKED}
    pictures = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        sampled = sample_batch(parts, batch, options, options.seed + start)
        pictures += [to_picture(one.permute(1, 2, 0)) for one in sampled]
        for scene, answers in zip(batch, world_reader.read(reader, sampled), strict=True):
            for name in ASKED:
                right[name].append(answers[name] == getattr(scene, name))
        logger.info("%d of %d: %s", len(pictures), len(scenes), shares(right))
    if options.sheet:
        labels = [world.caption(scene) for scene in scenes]
        sheet(pictures[: options.shown], labels[: options.shown], columns=6).save(options.sheet)
    return shares(right)


def shares(right: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers, three digits."""
    return {name: round(sum(marks) / len(marks), 3) for name, marks in right.items()}


def main() -> None:
    """Evaluate, print, and fail below the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    host.add_comfyui_argument(parser)
    parser.add_argument("--assets", type=Path, default=host.ASSETS)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write the first pictures here")
    parser.add_argument("--shown", type=int, default=24, help="pictures on the sheet")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host.use_comfyui(options.comfyui)
    result = evaluate(options)
    logger.info(
        json.dumps({"pixels": options.size, "steps": options.steps, "cfg": options.cfg, "right": result})
    )
    if min(result[name] for name in BARRED) < BAR:
        raise SystemExit(f"Below {BAR:.0%} for one of {', '.join(BARRED)}.")


if __name__ == "__main__":
    main()

"""Judges the model's samples: how often do they match their captions, at every size?

    python evaluate_world.py --comfyui FOLDER [--count 200] [--sizes 256 256x192] [--sheet samples.png]

The captions are in none of the training pictures. ComfyUI samples; the shipped reader judges.
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
from world_data import held_out_scenes

logger = logging.getLogger("evaluate_world")
ASKED = ("shape", "colour", "ground", "place", "size", "finish")
BAR = 0.9
SIZES = ("128", "192", "256", "320", "256x192", "192x256")
BATCH_PIXELS = 20 * 256**2


def parsed_size(text: str) -> tuple[int, int]:
    """``256`` or ``256x192`` as width and height."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or any(side < 16 or side % 16 for side in sides):
        raise argparse.ArgumentTypeError(
            f"a size is one or two multiples of 16 such as 256 or 256x192, not {text!r}"
        )
    return sides[0], sides[-1]


def sample_batch(
    parts: tuple, texts: list[str], size: tuple[int, int], options: argparse.Namespace, seed: int
) -> torch.Tensor:
    """One picture per text, ``[B, 3, H, W]`` in [0, 1], sampled together by ComfyUI's Euler sampler."""
    import comfy.sample

    model, clip, vae = parts
    empty = torch.zeros(len(texts), 16, size[1] // 8, size[0] // 8)
    noise = comfy.sample.prepare_noise(empty, seed)
    negative = encode(clip, "")
    positive = joined([encode(clip, text) for text in texts])
    latent = comfy.sample.sample(
        model, noise, options.steps, options.cfg, "euler", "simple", positive, negative, empty,
        seed=seed, disable_pbar=True,
    )  # fmt: skip
    return vae.decode(latent).permute(0, 3, 1, 2).clamp(0, 1)


def reading_windows(pictures: torch.Tensor, scenes: list[world.Scene]) -> torch.Tensor:
    """Squares ``[B, 3, S, S]`` of pictures ``[B, 3, H, W]``, as the reader only takes squares; S is the shorter side.

    Each is cut so that its scene's place has the same relative position in the square as in the picture. So in a
    picture that matches its caption the reader finds the same place, and in any other it does not.
    """
    height, width = pictures.shape[-2:]
    side, windows = min(height, width), []
    for picture, scene in zip(pictures, scenes, strict=True):
        x, y = world.PLACES[scene.place]
        left, top = round(x * (width - side)), round(y * (height - side))
        windows.append(picture[:, top : top + side, left : left + side])
    return torch.stack(windows)


def joined(conditionings: list[list]) -> list[list[Any]]:
    """Join conditionings of one row each to one with a row per picture."""
    tokens = torch.cat([one[0][0] for one in conditionings])
    pooled = torch.cat([one[0][1]["pooled_output"] for one in conditionings])
    return [[tokens, {**conditionings[0][0][1], "pooled_output": pooled}]]


def evaluate(
    parts: tuple, size: tuple[int, int], options: argparse.Namespace
) -> tuple[dict[str, float], list]:
    """Share of right answers per question at a size, and the first pictures."""
    reader = world_reader.load_reader(options.assets / host.READER_FILE)
    scenes, batch = held_out_scenes(options.count), max(1, BATCH_PIXELS // (size[0] * size[1]))
    right: dict[str, list[bool]] = {name: [] for name in ASKED}
    pictures: list = []
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        texts = [world.caption(scene) for scene in some]
        sampled = sample_batch(parts, texts, size, options, options.seed + start)
        pictures += [to_picture(one.permute(1, 2, 0)) for one in sampled[: options.shown - len(pictures)]]
        answers = world_reader.read(reader, reading_windows(sampled, some))
        for scene, answer in zip(some, answers, strict=True):
            for name in ASKED:
                right[name].append(answer[name] == getattr(scene, name))
        logger.info("%d of %d: %s", start + len(some), len(scenes), shares(right))
    return shares(right), pictures


def shares(right: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers, with three digits."""
    return {name: round(sum(marks) / len(marks), 3) for name, marks in right.items()}


def judge(parts: tuple, options: argparse.Namespace) -> list[str]:
    """Evaluate at every size, log the shares, write the sheet, and return what is below the bar."""
    below = []
    for size in options.sizes:
        right, pictures = evaluate(parts, size, options)
        about = {"pixels": size, "count": options.count, "steps": options.steps, "cfg": options.cfg}
        logger.info(json.dumps({**about, "right": right}))
        below += [f"{name} at {size[0]} x {size[1]}" for name, share in right.items() if share < BAR]
        if options.sheet:
            labels = [world.caption(scene) for scene in held_out_scenes(options.count)[: len(pictures)]]
            sheet(pictures, labels, columns=6).save(options.sheet)
    return below


def main() -> None:
    """Evaluate, print, and fail below the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    host.add_comfyui_argument(parser)
    parser.add_argument("--assets", type=Path, default=host.ASSETS)
    host.add_dit_argument(parser)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sizes", nargs="+", type=parsed_size, default=[parsed_size(size) for size in SIZES])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write the first pictures of the last size here")
    parser.add_argument("--shown", type=int, default=24, help="pictures on the sheet")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host.use_comfyui(options.comfyui)
    below = judge(load_world(options.assets, options.dit), options)
    if below:
        raise SystemExit(f"Below {BAR:.0%}: {', '.join(below)}.")


if __name__ == "__main__":
    main()

"""Trains the world's reader on drawn pictures and reports how often it is right on others.

    python train_reader.py [--steps 3000] [--check]

This does not need ComfyUI. ``--check`` only measures the shipped file.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import world
from world_reader import ANSWERS, READING_SIZE, SHARPNESS, UNSAID, Reader, answer_ids, load_reader

logger = logging.getLogger("train_reader")
ASSET = Path(__file__).resolve().parent / "assets" / "blockskip_world_reader.safetensors"
POOL, TEST_SCENES = 18000, 3000
SUBJECT_SHARE = 0.3
BLURS = {"sharp": (0.0, 0.0), "soft": (0.012, 0.022), "smudged": (0.03, 0.055)}  # radius in pictures
BATCH = 64
RATE = 3e-3


def random_subject(rng: random.Random) -> world.SubjectScene:
    """A subject anywhere, on any ground."""
    return world.SubjectScene(
        rng.choice(list(world.SUBJECTS)),
        rng.choice(world.GROUNDS),
        rng.choice(list(world.PLACES)),
        rng.randrange(2**31),
    )


def blurred(picture: Image.Image, sharpness: str, rng: random.Random) -> Image.Image:
    """Blur a picture by a random radius of its class."""
    radius = rng.uniform(*BLURS[sharpness]) * picture.width
    return picture.filter(ImageFilter.GaussianBlur(radius)) if radius else picture


def pool(count: int, seed: str) -> tuple[Tensor, Tensor]:
    """``[count, 3, 128, 128]`` bytes and their answers ``[count, questions]``; half are sharp."""
    rng = random.Random(seed)
    sharpness_at = list(ANSWERS).index("sharpness")
    pictures, answers = [], []
    for _ in range(count):
        scene = random_subject(rng) if rng.random() < SUBJECT_SHARE else world.random_scene(rng)
        sharpness = rng.choices(SHARPNESS, weights=(2, 1, 1))[0]
        picture = world.render(scene, rng.choice((READING_SIZE, 2 * READING_SIZE))).resize(
            (READING_SIZE,) * 2, 4
        )
        pictures.append(np.asarray(blurred(picture, sharpness, rng)))
        ids = answer_ids(scene)
        ids[sharpness_at] = SHARPNESS.index(sharpness)
        if sharpness == "smudged" and not isinstance(scene, world.SubjectScene):
            ids = [value if name != "finish" else UNSAID for name, value in zip(ANSWERS, ids, strict=True)]
        answers.append(ids)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(answers)


def unsteady(pictures: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [0, 1] with small changes of light, colour, position and grain, as in samples."""
    batch = len(pictures)
    light = 1 + 0.08 * torch.randn(batch, 3, 1, 1)
    pictures = pictures * light + 0.03 * torch.randn(batch, 3, 1, 1)
    pictures = pictures + 0.03 * torch.rand(batch, 1, 1, 1) * torch.randn_like(pictures)
    down, right = (int(n) for n in torch.randint(-2, 3, (2,)))
    return pictures.roll((down, right), dims=(2, 3)).clamp(0, 1)


def reading_loss(scores: dict[str, Tensor], answers: Tensor) -> Tensor:
    """Mean cross entropy over the questions that the pictures answer."""
    losses = [
        cross_entropy(scores[name].float(), answers[:, i], ignore_index=UNSAID, label_smoothing=0.05)
        for i, name in enumerate(ANSWERS)
    ]
    return torch.stack(losses).sum()


def train(options: argparse.Namespace) -> Reader:
    """Train for the given steps with a one-cycle learning rate."""
    torch.manual_seed(options.seed)
    pictures, answers = pool(POOL, f"{options.seed}/train")
    reader = Reader().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=options.steps)
    started, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(1, options.steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(POOL)
        rows, order = order[:BATCH], order[BATCH:]
        batch = unsteady(pictures[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            scores = reader(batch)
        loss = reading_loss(scores, answers[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            logger.info("reader: step %d, %.0f s, loss %.3f", step, time.monotonic() - started, loss.item())
    reader.eval()
    with torch.no_grad():
        reader.centre += torch.cat(
            [reader.features(part.float() / 255) for part in pictures[:2000].split(250)]
        ).mean(0)
    return reader


@torch.no_grad()
def accuracy(reader: Reader, count: int, seed: str) -> dict[str, float]:
    """Share of right answers on sharp pictures drawn from another seed."""
    rng = random.Random(seed)
    right: dict[str, list[bool]] = {name: [] for name in ANSWERS if name != "sharpness"}
    for start in range(0, count, 250):
        scenes = [
            random_subject(rng) if rng.random() < SUBJECT_SHARE else world.random_scene(rng)
            for _ in range(min(250, count - start))
        ]
        drawn = np.stack([np.asarray(world.render(scene, READING_SIZE)) for scene in scenes])
        scores = reader(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255)
        expected = torch.tensor([answer_ids(scene) for scene in scenes])
        for i, name in enumerate(ANSWERS):
            if name in right:
                asked = expected[:, i] != UNSAID
                right[name] += (scores[name].argmax(1) == expected[:, i])[asked].tolist()
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def main() -> None:
    """Train or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asset", type=Path, default=ASSET)
    parser.add_argument("--check", action="store_true", help="measure the file that is there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.check:
        reader = train(options)
        state = {
            name: value.half() for name, value in reader.state_dict().items() if value.is_floating_point()
        }
        save_file(
            {name: value.contiguous() for name, value in state.items()}, options.asset, {"format": "pt"}
        )
    shares = accuracy(load_reader(options.asset), TEST_SCENES, f"{options.seed}/test")
    logger.info(
        "right on %d drawn pictures: %s", TEST_SCENES, {k: f"{100 * v:.1f} %" for k, v in shares.items()}
    )
    if not math.isfinite(sum(shares.values())) or min(shares.values()) < 0.98:
        raise SystemExit("The reader is right in less than 98 % of the pictures for some question.")


if __name__ == "__main__":
    main()

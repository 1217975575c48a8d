"""The transformer's training pictures: encoded once, part by part, during the training."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import host
import world
from world_files import write_atomically
from world_views import Size, View, random_view, whole_scene

logger = logging.getLogger("world_data")

FIRST_SHARDS, FIRST_SHARD = {128: 15, 256: 6}, 2000
HELD_OUT = 200
GROWTH = 1600  # steps of unscaled batches after which every bucket gets another part
CAPTION_DROPOUT = 0.1
SAID_SHARE = 0.9  # how often captions include the size, and how often the place
MAX_OBJECT_WEIGHT = 8.0
SHOWN = {
    "star": 6.0,
    "heart": 3.0,
    "ring": 1.5,
    "square": 1.5,
}  # how much more often than others, because these are hard to learn


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size that are trained on together.

    Attributes:
        size: Width and height in pixels.
        batch: Pictures per step; about as many tokens at every size.
        chance: How often a step uses this bucket, relative to the others.
        views, parts: Pictures in a part, and the number of parts.
        plain: Whether it has whole scenes with full captions only, as the shipped weights were trained on.
    """

    size: Size
    batch: int
    chance: float
    views: int
    parts: int
    plain: bool = False

    @property
    def shift(self) -> float:
        """How far noise levels are shifted towards noise; larger pictures need a larger shift."""
        return 1.8 * (self.size[0] * self.size[1] / 128**2) ** 0.3


BUCKETS = (
    Bucket((128, 128), 32, 0.16, 1500, 8),
    Bucket((192, 128), 21, 0.05, 750, 8),
    Bucket((128, 192), 21, 0.05, 750, 8),
    Bucket((192, 192), 14, 0.12, 1000, 8),
    Bucket((256, 192), 11, 0.11, 500, 8),
    Bucket((192, 256), 11, 0.12, 500, 8),
    Bucket((256, 256), 8, 0.19, 800, 8),
    Bucket((320, 320), 5, 0.2, 400, 8),
)
LARGE = Bucket((512, 512), 2, 1.0, 500, 12, plain=True)  # for a model of large pictures alone


def held_out_scenes(count: int, seed: int = 0) -> list[world.Scene]:
    """Return up to ``HELD_OUT`` scenes whose captions are in none of the training pictures, at any size.

    They were in none of the pictures of the first training run, which are drawn again here, and later views avoid them.
    """
    if count > HELD_OUT:
        raise ValueError(f"only {HELD_OUT} captions are kept out of the training, not {count}: ask for fewer")
    return list(_kept_out(seed)[:count])


@lru_cache(maxsize=2)
def _kept_out(seed: int) -> tuple[world.Scene, ...]:
    """All ``HELD_OUT`` of them."""
    known = {
        world.caption(world.random_scene(rng))
        for size, shards in FIRST_SHARDS.items()
        for number in range(shards)
        for rng in [random.Random(f"{seed}/{size}/{number}")]
        for _ in range(FIRST_SHARD)
    }
    rng, chosen = random.Random(f"{seed}/held out"), {}
    while len(chosen) < HELD_OUT:
        scene = world.random_scene(rng)
        if world.caption(scene) not in known:
            chosen.setdefault(world.caption(scene), scene)
    return tuple(chosen.values())


def part_views(bucket: Bucket, number: int, seed: int) -> list[View]:
    """The views of one part of a bucket."""
    reserved = frozenset(world.caption(scene) for scene in held_out_scenes(HELD_OUT))
    rng = random.Random(f"{seed}/views/{bucket.size}/{number}")
    draw = whole_scene if bucket.plain else random_view
    return [draw(rng, bucket.size, reserved) for _ in range(bucket.views)]


def to_tensor(pictures: list) -> Tensor:
    """PIL pictures of one size to ``[B, 3, H, W]`` bytes."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def object_weights(view: View) -> Tensor:
    """Weights ``[h, w]`` of mean 1 per latent cell that give a view's object as much of the loss as its ground.

    Grounds are most of a picture, and without this the shape of small objects is learned last. A weight per position
    does not move the optimum, which is the mean of the data at every position.
    """
    x, y, radius = view.circle()
    inside = []
    for middle, side in ((y, view.size[1]), (x, view.size[0])):
        reach = 1.2 * radius * min(view.size) / side
        inside.append((((torch.arange(side // 8) + 0.5) / (side // 8)) - middle).abs() < reach)
    both = inside[0].unsqueeze(1) & inside[1].unsqueeze(0)
    share = both.float().mean().clamp_min(1e-3)
    weights = torch.where(both, ((1 - share) / share).clamp(1.0, MAX_OBJECT_WEIGHT), 1.0)
    return (weights / weights.mean()).half()


@dataclass
class Latents:
    """The training pictures as latents, encoded on first use and kept in a folder.

    Attributes:
        folder: The folder of the parts.
        seed: Seed of the pictures.
        coder: The autoencoder.
        word_ids: Returns a caption's ids.
    """

    folder: Path
    seed: int
    coder: torch.nn.Module
    word_ids: Callable[[str], list[int]]

    def __post_init__(self) -> None:
        self._loaded: dict[Bucket, dict[str, Tensor]] = {}

    def part(self, bucket: Bucket, number: int) -> dict[str, Tensor]:
        """Latents ``[N, 16, h, w]``, word ids ``[N, 4, L]``, weights ``[N, h, w]`` and chances ``[N]`` of a part."""
        path = self.folder / f"views_{bucket.size[0]}x{bucket.size[1]}_{number:02d}.safetensors"
        if path.exists():
            return load_file(path)
        views = part_views(bucket, number, self.seed)
        write_atomically(
            path,
            {
                "latents": torch.cat([self._encoded(views[i : i + 50]) for i in range(0, len(views), 50)]),
                "ids": torch.tensor([[self.word_ids(text) for text in view.captions()] for view in views]),
                "weights": torch.stack([object_weights(view) for view in views]),
                "shown": torch.tensor([SHOWN.get(view.scene.shape, 1.0) for view in views]),
            },
            {},
        )
        logger.info("dit: wrote %s", path.name)
        return load_file(path)

    def _encoded(self, views: list[View]) -> Tensor:
        """Latents ``[B, 16, h, w]`` in half precision."""
        device = next(self.coder.parameters()).device
        pictures = to_tensor([view.draw() for view in views]).to(device).float() / 255
        with torch.inference_mode(), host.half_precision(device):
            return self.coder.encode(pictures.contiguous(memory_format=torch.channels_last)).half().cpu()

    def available(self, bucket: Bucket, step: int) -> dict[str, Tensor]:
        """All of a bucket's pictures that are in use at a step of unscaled batches."""
        wanted = min(bucket.parts, 1 + step // GROWTH)
        held = self._loaded.get(bucket)
        while held is None or len(held["ids"]) < wanted * bucket.views:
            number = 0 if held is None else len(held["ids"]) // bucket.views
            part = self.part(bucket, number)
            held = part if held is None else {key: torch.cat([held[key], part[key]]) for key in held}
        self._loaded[bucket] = held
        return held


def random_bucket(buckets: Sequence[Bucket] = BUCKETS) -> Bucket:
    """Choose a bucket by its chance, with PyTorch's global generator."""
    chances = torch.tensor([bucket.chance for bucket in buckets])
    return buckets[int(torch.multinomial(chances, 1))]


def random_rows(
    data: dict[str, Tensor], batch: int, said_share: float = SAID_SHARE
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents ``[batch, 16, h, w]``, word ids ``[batch, L]``, weights ``[batch, h, w]`` of random views.

    A tenth of the captions are empty; ``said_share`` of the others include the size, and as many the place, where they are
    true.
    """
    rows = torch.multinomial(data["shown"], batch)
    unsaid = (torch.rand(2, batch) >= said_share).long()
    ids = data["ids"][rows, 2 * unsaid[0] + unsaid[1]]
    kept = torch.rand(batch, 1) >= CAPTION_DROPOUT
    return data["latents"][rows].float(), ids * kept, data["weights"][rows].float()


def random_sigmas(batch: int, shift: float) -> Tensor:
    """Noise levels ``[batch]``: logit-normal, shifted towards noise by ``shift``, one in ten uniform."""
    sigma = torch.randn(batch).sigmoid()
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return torch.where(torch.rand(batch) < 0.1, torch.rand(batch), sigma)

"""A small world of clips: one shape that moves, drawn by code, as latents without an autoencoder.

A clip is ``FRAMES`` grey pictures. Its latent has the cells of 4 x 4 pixels of every picture in the basis of their discrete cosine
transform, which loses nothing, so errors of latents are errors of pixels. Where the shape is follows from the noise; the prompt
says what it is and in which direction it moves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE, CELL, FRAMES = 64, 4, 5
PICTURES = 4 * (FRAMES - 1) + 1  # of a clip with so many latent frames, as Wan counts them
MIDDLE, SPREAD = 0.121, 0.154  # of the world's pixels: mean and standard deviation
BACKGROUND, FOREGROUND, STRIPE = 0.08, 0.85, 0.45  # grey levels
KINDS, SIZES, FILLS, DIRECTIONS = ("disc", "square", "ring"), ("small", "large"), ("plain", "striped"), 8
RADIUS = {"small": 7.0, "large": 11.0}  # pixels
SPEED = 5.0  # pixels per frame
TEXT_TOKENS, TEXT_WIDTH = 4, 32
HELD_OUT = 6  # every so-many-th prompt is not trained on


@dataclass(frozen=True)
class Scene:
    """What a prompt says.

    Attributes:
        kind, size, fill: Words of ``KINDS``, ``SIZES`` and ``FILLS``.
        direction: Of the movement, in eighths of a turn from rightward to downward.
    """

    kind: str
    size: str
    fill: str
    direction: int


_ALL = list(itertools.starmap(Scene, itertools.product(KINDS, SIZES, FILLS, range(DIRECTIONS))))
_MIXED = [_ALL[place] for place in torch.randperm(len(_ALL), generator=torch.Generator().manual_seed(0))]
UNSEEN = tuple(_MIXED[::HELD_OUT])
SEEN = tuple(scene for scene in _MIXED if scene not in UNSEEN)


def drawn(scene: Scene, middle: Sequence[float]) -> Tensor:
    """Return a clip, (F, H, W) in [0, 1].

    Args:
        scene: What to draw.
        middle: Row and column of the shape half-way through the clip, in pixels.
    """
    angle = 2.0 * math.pi * scene.direction / DIRECTIONS
    moved = SPEED * (torch.arange(FRAMES) - (FRAMES - 1) / 2)
    pixels = torch.arange(SIDE) + 0.5
    down = pixels.view(1, -1, 1) - (middle[0] + moved * math.sin(angle)).view(-1, 1, 1)
    right = pixels.view(1, 1, -1) - (middle[1] + moved * math.cos(angle)).view(-1, 1, 1)
    radius, away = RADIUS[scene.size], (down.square() + right.square()).sqrt()
    outside = {
        "disc": away - radius,
        "square": torch.maximum(down.abs(), right.abs()) - 0.886 * radius,  # half a side; the disc's area
        "ring": (away - 0.8 * radius).abs() - 0.25 * radius,
    }[scene.kind]
    is_dark = (down.expand_as(away) / 3.0).floor() % 2 == 1
    grey = torch.where(is_dark & (scene.fill == "striped"), STRIPE, FOREGROUND)
    return BACKGROUND + (grey - BACKGROUND) * torch.sigmoid(-2.0 * outside)


def any_middle(scene: Scene, generator: torch.Generator) -> list[float]:
    """Return a place at which the whole movement is in the picture."""
    margin = RADIUS[scene.size] + SPEED * (FRAMES - 1) / 2 + 2.0
    return (margin + (SIDE - 2.0 * margin) * torch.rand(2, generator=generator)).tolist()


def _basis() -> Tensor:
    """Return the orthonormal basis of a cell's cosine transform, (CELL^2, CELL^2): a row per coefficient."""
    places = torch.arange(CELL, dtype=torch.float64)
    lines = torch.cos(math.pi / CELL * (places[None] + 0.5) * places[:, None]) * math.sqrt(2.0 / CELL)
    lines[0] /= math.sqrt(2.0)
    return torch.kron(lines, lines).float()


def to_latents(clips: Tensor) -> Tensor:
    """Return clips (B, F, H, W) as latents (B, CELL^2, F, H / CELL, W / CELL)."""
    cells = ((clips - MIDDLE) / SPREAD).unflatten(-1, (-1, CELL)).unflatten(2, (-1, CELL))
    return (cells.transpose(3, 4).flatten(4) @ _basis().T).movedim(-1, 1)


def to_clips(latents: Tensor) -> Tensor:
    """Return latents as clips; the reverse of :func:`to_latents`."""
    cells = (latents.movedim(1, -1) @ _basis()).unflatten(-1, (CELL, CELL)).transpose(3, 4)
    return cells.flatten(4).flatten(2, 3) * SPREAD + MIDDLE


def tokens_of(scene: Scene | None) -> Tensor:
    """Return a prompt's text tokens, (TEXT_TOKENS, TEXT_WIDTH): a word each, all orthogonal; zeros without a scene."""
    tokens = torch.zeros(TEXT_TOKENS, TEXT_WIDTH)
    if scene is not None:
        words = (KINDS.index(scene.kind), SIZES.index(scene.size), FILLS.index(scene.fill), scene.direction)
        for token, (word, before) in enumerate(zip(words, (0, 3, 5, 7), strict=True)):
            tokens[token, before + word] = TEXT_WIDTH**0.5
    return tokens


def conditioning(scenes: Sequence[Scene | None]) -> list:
    """Return a CONDITIONING of prompts."""
    return [[torch.stack([tokens_of(scene) for scene in scenes]), {"pooled_output": None}]]


def direction_of(clip: Tensor) -> int:
    """Return in which direction what is bright moves from the first to the last frame; clip is (F, H, W)."""
    bright = (clip - 0.5 * (BACKGROUND + STRIPE)).clamp(min=0.0)
    pixels, mass = torch.arange(SIDE) + 0.5, bright.sum((1, 2)).clamp(min=1e-6)
    rows, columns = (bright.sum(2) @ pixels) / mass, (bright.sum(1) @ pixels) / mass
    angle = math.atan2(rows[-1] - rows[0], columns[-1] - columns[0])
    return round(angle / (2.0 * math.pi) * DIRECTIONS) % DIRECTIONS

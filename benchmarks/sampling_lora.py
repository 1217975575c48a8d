"""A LoRA with coarse steps: whether its subject stays what it is, on grounds that are not in its training pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from ralu_pictures import World
from sampling_ways import MIXED, Way, every_other, plain
from sampling_world import sampled

SUBJECT, PICTURES = "toby", 5
WORK = (25, 10)  # plain steps
logger = logging.getLogger("__main__")


def ways() -> Iterator[tuple[bool, Way]]:
    """Yield whether the LoRA is on the model, and the way of sampling; the others are compared with the first that has it."""
    yield False, plain(WORK[-1])
    for work in WORK:
        yield True, plain(work)
        yield True, every_other(MIXED[work])


def rows(world: World, trained: TrainedPatches, side: int, file: Path) -> Iterator[dict[str, Any]]:
    """Yield a row per way with the LoRA of a file.

    Args:
        world: The world.
        trained: Adapters, trained without the LoRA.
        side: Of the pictures in pixels.
        file: A LoRA of the demo's first subject, as ``python dev.py demo`` makes one.
    """
    before = world.model, world.scenes
    lora = comfy.utils.load_torch_file(str(file), safe_load=True)
    with_it, _ = comfy.sd.load_lora_for_models(world.model, None, lora, 1.0, 0.0)
    world.scenes = world.drawing.subject_scenes(SUBJECT, PICTURES, seed=1, held_out=True)
    drawn, full = world.drawn(), None
    try:
        for has_it, way in ways():
            started = time.perf_counter()
            world.model = with_it if has_it else before[0]
            made = sampled(world, trained, way, side)
            full = made.pictures if has_it and full is None else full
            likeness = world.reading.similarity(world.reader, made.pictures, drawn)
            answers = zip(world.reading.read(world.reader, made.pictures), world.scenes, strict=True)
            row = {
                "side": side, "subject": SUBJECT, "lora": has_it, "name": way.name, "plain_steps": round(made.plain_steps, 2),
                "prompts": len(drawn), "likeness": likeness.mean().item(),
                "likeness_error": (likeness.std() / len(likeness) ** 0.5).item(),
                "recognised": sum(answer["subject"] == scene.subject for answer, scene in answers) / len(drawn),
                "from_full": None if full is None else (made.pictures - full).square().mean().sqrt().item(),
                "seconds": round(time.perf_counter() - started, 1),
                "likeness_each": [round(value, 4) for value in likeness.tolist()],
            }  # fmt: skip
            logger.info("%s", {key: value for key, value in row.items() if key != "likeness_each"})
            yield row
    finally:
        world.model, world.scenes = before

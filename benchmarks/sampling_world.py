"""Every way to sample with fewer operations on the demo's world, alone and together, compared at equal operations.

Operations are those of the calls that a way really makes: a hook on the model's first layer reads how many rows and tokens
each call has. So calls that a cache spares are not counted, whatever the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import ddit_world
import torch
from blockskip_pack.blockskip_core.ddit.plans import TypedWindows
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches
from ralu_pictures import SIZE, TOKEN, World, measures, pictures_of, plain, staged
from torch import Tensor

FULL = 28
logger = logging.getLogger("__main__")


@dataclass(frozen=True)
class Way:
    """A way of sampling.

    Attributes:
        name: Readable name.
        steps: Steps of the sampler.
        preset: RALU's preset; None for Euler on the ordinary schedule.
        cache: EasyCache's threshold; 0 for none.
        windows: The coarse steps, as typed on Dynamic Patches; empty for none.
    """

    name: str
    steps: int
    preset: str | None = None
    cache: float = 0.0
    windows: str = ""

    def model(self, own: Any, trained: TrainedPatches) -> Any:
        """Return the MODEL with what this way puts on it."""
        from comfy_extras.nodes_easycache import EasyCacheNode

        model = own
        if self.cache:
            model = own.clone()
            wrapper = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
            model.add_wrapper_with_key(wrapper, "own latent", _with_own_latent)
            model = EasyCacheNode.execute(model, self.cache, 0.15, 0.95, False)[0]
        if self.windows:
            model = DynamicPatches(model, trained, TypedWindows(self.windows, ddit_world.SCALES)).patcher
        return model


def _with_own_latent(executor: Callable[..., Tensor], latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call the model on a copy: in float32 EasyCache writes into its caller's latent."""
    return executor(latent.clone(), *args, **kwargs)


def alternating(first: int, last: int) -> str:
    """Return windows in which every other step from ``first`` to ``last`` is coarse."""
    return ", ".join(f"{step}: 2" for step in range(first, last + 1, 2))


WAYS = (  # the first is what the others are compared with
    *(Way(f"plain, {steps} steps", steps) for steps in (FULL, 9, 7, 5)),
    Way("RALU, FLUX 5x", 15, preset="FLUX 5x"),
    Way("RALU, FLUX 7x", 10, preset="FLUX 7x"),
    Way("EasyCache 0.2, 15 steps", 15, cache=0.2),
    Way("EasyCache 0.3, 9 steps", 9, cache=0.3),
    Way("DDiT, every other of 13 steps", 13, windows=alternating(2, 12)),
    Way("DDiT, every other of 10 steps", 10, windows=alternating(2, 10)),
    Way("DDiT, every other of 7 steps", 7, windows=alternating(2, 6)),
    Way("RALU, FLUX 5x, and EasyCache 0.2", 15, preset="FLUX 5x", cache=0.2),
    Way("DDiT, every other of 20 steps, and EasyCache 0.2", 20, windows=alternating(2, 20), cache=0.2),
    Way("EasyCache 0.3, 12 steps", 12, cache=0.3),
    Way("plain, 12 steps", 12),
)


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
    """Return the operations of counted rows, in plain steps of one picture with guidance."""
    own = (side // TOKEN) ** 2
    coarse = {own // scale**2: operations for scale, operations in trained.operations_of(own).items()}
    known = coarse if way.windows else {}
    total = sum(number * known.get(tokens, world.operations(tokens)) for tokens, number in rows.items())
    return total / (2 * pictures * world.operations(own))


def rows(world: World, trained: TrainedPatches, side: int, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield a row per way for pictures of ``side`` pixels, without the ways in ``done``."""
    own, drawn, full = world.model, world.drawn(), None
    missing = [way for way in WAYS if way.name not in done]
    for way in (WAYS[0], *(way for way in missing if way is not WAYS[0])) if missing else ():
        started = time.perf_counter()
        try:
            world.model = way.model(own, trained)
            arm = staged(world, way.preset, 0.2, side) if way.preset else plain(world, "", way.steps, side)
            with torch.inference_mode(), counted_calls(world) as calls:
                pictures = pictures_of(world, arm, side)
        finally:
            world.model = own
        full = pictures if full is None else full
        row = {
            "side": side, "name": way.name, "steps": way.steps, "calls": {str(tokens): n for tokens, n in sorted(calls.items())},
            "plain_steps": round(plain_steps(world, way, calls, trained, len(drawn), side), 2), "prompts": len(drawn),
            "from_full": _difference(pictures, full), "seconds": round(time.perf_counter() - started, 1),
            **_judged(world, as_read(pictures), drawn),
        }  # fmt: skip
        logger.info("%s", row)
        if way in missing:
            yield row


def as_read(pictures: Tensor) -> Tensor:
    """Return pictures at the size that the reader knows."""
    return torch.nn.functional.interpolate(pictures, size=(SIZE, SIZE), mode="area")


def _difference(pictures: Tensor, others: Tensor) -> float:
    return (pictures - others).square().mean().sqrt().item()


def _judged(world: World, pictures: Tensor, drawn: Tensor) -> dict[str, float]:
    likeness = world.reading.similarity(world.reader, pictures, drawn)
    right = measures(world, pictures, drawn)
    names = ("shape", "colour", "ground", "place", "size", "finish")
    return {
        "likeness": likeness.mean().item(), "likeness_error": (likeness.std() / len(likeness) ** 0.5).item(),
        "right": sum(right[name] for name in names) / len(names),
    }  # fmt: skip

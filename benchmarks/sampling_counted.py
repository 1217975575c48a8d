"""What the ways of ``sampling_world`` cost on published models at full size, counted without weights and without a GPU.

How many calls a cache spares depends on the pictures; here it is as on the demo's world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS
from ddit_operations import FLUX, QWEN, WAN, Z_IMAGE, Subject, by_tokens, step
from sampling_ways import BUDGETS, FULL, MIXED

SUBJECTS = (FLUX, Z_IMAGE, QWEN, WAN)
EARLY = 0.2  # share of regions that RALU refines early
CACHED = {15: 9, 12: 6}  # steps -> calls with EasyCache at 0.2 and 0.3
ON_WAN = (44, 30, 17)  # steps that cost as many plain ones as ``BUDGETS`` there, if every other one is coarse
CACHED_STAGES = (4, 4, 4)  # calls in RALU's stages, FLUX 5x, with EasyCache at 0.2


@dataclass(frozen=True)
class Counted:
    """A way of sampling.

    Attributes:
        name: Readable name, as in ``sampling_world`` if it is there.
        cost: Model -> operations of a picture, without guidance by a second call.
        one_frame: Whether it makes single pictures only.
    """

    name: str
    cost: Callable[[Subject], float]
    one_frame: bool = False


def plain(steps: int) -> Counted:
    """Return fewer steps."""
    return Counted(f"plain, {steps} steps", lambda subject: steps * step(subject, 1))


def staged(name: str, calls: tuple[int, ...]) -> Counted:
    """Return RALU with so many calls in its stages."""

    def cost(subject: Subject) -> float:
        coarse = subject.tokens // 4
        tokens = (coarse, coarse + 3 * int(coarse * EARLY), 4 * coarse)
        return sum(number * by_tokens(subject).own(count) for number, count in zip(calls, tokens, strict=True))

    return Counted(name, cost, one_frame=True)


def alternating(steps: int) -> Counted:
    """Return DDiT with every other step coarse, from the second on."""
    coarse = steps // 2
    return Counted(
        f"DDiT, every other of {steps} steps",
        lambda subject: (steps - coarse) * step(subject, 1) + coarse * step(subject, 2),
    )


WAYS = (
    *(plain(steps) for steps in sorted({FULL, 28, 20, *BUDGETS}, reverse=True)),
    staged("RALU, FLUX 5x", tuple(PRESETS["FLUX 5x"].steps)), staged("RALU, FLUX 7x", tuple(PRESETS["FLUX 7x"].steps)),
    Counted("EasyCache 0.2, 15 steps", lambda subject: CACHED[15] * step(subject, 1)),
    Counted("EasyCache 0.3, 12 steps", lambda subject: CACHED[12] * step(subject, 1)),
    *(alternating(steps) for steps in sorted({*MIXED.values(), *ON_WAN, 20, 13, 10}, reverse=True)),
    staged("RALU, FLUX 5x, and EasyCache 0.2", CACHED_STAGES),
)  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Return a row per model and way."""
    return [
        {
            "model": subject.name, "size": subject.size, "text_tokens": subject.text[0], "name": way.name,
            "operations": way.cost(subject), "plain_steps": way.cost(subject) / step(subject, 1),
        }
        for subject in SUBJECTS for way in WAYS if subject.frames == 1 or not way.one_frame
    ]  # fmt: skip

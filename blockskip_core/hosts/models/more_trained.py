"""Whether a run has room for more trained blocks than `skip and freeze` leaves by default.

Of all choices that save as much memory, skipping a quarter of the blocks and freezing half of them learned the most on the
demo's model; but half of these shares learned more where there was room (``benchmarks/quality.py``). Which choice is best
depends on the card, so a plan that fits looks whether the other one fits as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...accounting.memory_needs import MemoryNeeds
from ...accounting.plan import MemorySettings, fits, peak_of
from ...selection.skip_and_freeze import skip_and_freeze
from .counted_run import CountedRun

RATIO = 0.25


@dataclass(frozen=True, kw_only=True)
class MoreTrained:
    """A choice that trains more blocks and fits.

    Attributes:
        ratio: Its `skip_ratio`.
        peak: Counted bytes on the device.
        work: Operations of a training step, relative to the plan's.
    """

    ratio: float
    peak: int
    work: float


def room_for_more(run: CountedRun, settings: MemorySettings, needs: MemoryNeeds, available: int) -> MoreTrained | None:
    """Return what :data:`RATIO` would need if that fits and trains more blocks, otherwise None.

    Args:
        run: Counts the planned run.
        settings, needs: With which it fits, and what it needs with them.
        available: Bytes of the device that it may use.
    """
    selection = run.selection
    if selection.method != "skip and freeze":
        return None
    other = skip_and_freeze(RATIO, selection.num_blocks, selection.family, selection.block_bytes)
    if other.frozen >= selection.frozen:
        return None
    more, changed = run.of(other), replace(settings, frozen=other.frozen)
    weights = more.trained_weights(changed) - run.trained_weights(settings)
    if not fits(needs.training.peak + weights, available):  # known without counting
        return None
    counted = more.needs(changed)
    peak = peak_of(changed, counted)
    if not fits(peak, available):
        return None
    return MoreTrained(ratio=RATIO, peak=peak, work=counted.training.operations / needs.training.operations)

"""Whether a run has room for more trained blocks than `skip and freeze` leaves by default.

Of all choices that save as much memory, skipping a quarter of the blocks and freezing half of them learned the most on the
demo's model: 0.96 of what a LoRA on all blocks learns. A twelfth skipped and a quarter frozen learned as much as all blocks, also
with all of them in 4-bit and corrected (``benchmarks/quality.py``). What is best depends on the card, so a plan that fits looks
whether that choice fits as well. On large models it is not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from ...accounting.memory_needs import MemoryNeeds
from ...accounting.plan import MemorySettings, fits, peak_of
from .counted_run import CountedRun

SKIPPED, FROZEN = 1 / 12, 1 / 4


@dataclass(frozen=True, kw_only=True)
class MoreTrained:
    """A choice that trains more blocks and fits.

    Attributes:
        skipped, frozen: Number of first and of last blocks.
        in_4_bit: Whether all blocks have to be in 4-bit for it.
        peak: Counted bytes on the device.
        work: Operations of a training step, relative to the plan's.
    """

    skipped: int
    frozen: int
    in_4_bit: bool
    peak: int
    work: float


def room_for_more(
    run: CountedRun, settings: MemorySettings, needs: MemoryNeeds, available: int, formats: Collection[str]
) -> MoreTrained | None:
    """Return what :data:`SKIPPED` and :data:`FROZEN` need if that fits and trains more blocks, otherwise None.

    Args:
        run: Counts the planned run.
        settings, needs: With which it fits, and what it needs with them.
        available: Bytes of the device that it may use.
        formats: Formats of weights that the device offers.
    """
    selection = run.selection
    if selection.method != "skip and freeze":
        return None
    skipped, frozen = (round(share * selection.num_blocks) for share in (SKIPPED, FROZEN))
    if frozen >= selection.frozen:
        return None
    more = run.of(replace(selection, front=skipped, frozen=frozen))
    for in_4_bit, changed in _ways(replace(settings, frozen=frozen), formats):
        weights = more.trained_weights(changed) - run.trained_weights(settings)
        if not fits(needs.training.peak + weights, available):  # known without counting
            continue
        counted = more.needs(changed)
        peak = peak_of(changed, counted)
        if fits(peak, available):
            work = counted.training.operations / needs.training.operations
            return MoreTrained(skipped=skipped, frozen=frozen, in_4_bit=in_4_bit, peak=peak, work=work)
    return None


def _ways(settings: MemorySettings, formats: Collection[str]) -> Iterator[tuple[bool, MemorySettings]]:
    """Yield the settings, and then those with all blocks in 4-bit if the device offers that."""
    yield settings.quantize_kept == settings.quantize_frozen == "4-bit", settings
    if "4-bit" in formats:
        yield True, replace(settings, quantize_kept="4-bit", quantize_frozen="4-bit")

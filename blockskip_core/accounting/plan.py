"""Does a run fit, and if not, what is the smallest change that makes it fit? Based on the counts of ``memory_needs``.

A plan is the part of a run's settings that memory depends on. Changes are tried one by one, starting with those that do
not affect the result; if no single change is enough, they are added up in that order. What a card needs besides the
counted bytes (the allocator's rounding, workspaces of kernels) is not known before a run: :data:`MARGIN` is left for
it, which has not been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..errors import InvalidInputError
from ..training.config import TrainingConfig
from ..units import format_bytes
from .memory_needs import MemoryNeeds

MARGIN = 0.05  # of the counted peak
CARDS = {"6 GB": 6, "8 GB": 8, "12 GB": 12, "16 GB": 16, "24 GB": 24}
"""Presets: the card's memory in GiB."""
RESERVED = (1 / 8, 0.5)
"""Share of a card, and GiB, left for driver, desktop, browser and the allocator's gaps: a guess, not measured."""
_PORTION = 2**29
PHASES = ("choosing blocks", "precomputing", "training")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The settings of a run that memory depends on, apart from model, captions and selection.

    Attributes:
        config: Settings of the training.
        storage: "disk", "chunked" or "on the fly".
        quantize_kept: Format of the kept blocks' weights for the run, or "off".
        patch_min: Side of a training crop in pixels.
        measured: Whether blocks are chosen by sampling pictures with the whole model.
        frozen: Number of blocks that run in training without adapters.
        quantize_frozen: Format of their weights for the run, or "off".
    """

    config: TrainingConfig
    storage: str = "disk"
    quantize_kept: str = "off"
    patch_min: int = 256
    measured: bool = False
    frozen: int = 0
    quantize_frozen: str = "off"

    def describe(self) -> str:
        """Return the settings as one readable line."""
        return ", ".join(self._parts()) + "."

    def changes_to(self, other: MemorySettings) -> list[str]:
        """Return what another object sets differently, in readable form, e.g. "quantize_kept int8"."""
        return [part for part in other._parts() if part not in self._parts()]

    def _parts(self) -> list[str]:
        config = self.config
        budget = config.activation_budget / 2**30
        parts = [
            f"patch_min {self.patch_min}",
            f"storage {self.storage}",
            f"batch_size {config.batch_size}",
            f"accumulation times {config.accumulation}" if config.accumulation > 1 else "",
            f"checkpointing {'on' if config.checkpointing else 'off'}",
            f"activation_budget {budget:g}" if config.checkpointing and budget else "",
            f"quantize_kept {self.quantize_kept}",
            f"quantize_frozen {self.quantize_frozen}" if self.frozen else "",
        ]
        return [part for part in parts if part]


@dataclass(frozen=True)
class Change:
    """One way to need less memory.

    Attributes:
        text: What to set, as shown to users.
        apply: Settings -> changed settings; the same object if it changes nothing.
    """

    text: str
    apply: Callable[[MemorySettings], MemorySettings]


def _config(**fields: Any) -> Callable[[MemorySettings], MemorySettings]:
    def apply(settings: MemorySettings) -> MemorySettings:
        changed = replace(settings.config, **fields)
        return settings if changed == settings.config else replace(settings, config=changed)

    return apply


def _store_in_chunks(settings: MemorySettings) -> MemorySettings:
    return replace(settings, storage="chunked") if settings.storage == "on the fly" else settings


_COARSENESS = {"off": 0, "fp8": 1, "int8": 1, "4-bit": 2}


def _quantised(weight_format: str) -> Callable[[MemorySettings], MemorySettings]:
    def apply(settings: MemorySettings) -> MemorySettings:
        finer = _COARSENESS[settings.quantize_kept] < _COARSENESS[weight_format]
        return replace(settings, quantize_kept=weight_format) if finer else settings

    return apply


def _frozen_quantised(weight_format: str) -> Callable[[MemorySettings], MemorySettings]:
    def apply(settings: MemorySettings) -> MemorySettings:
        finer = settings.frozen and _COARSENESS[settings.quantize_frozen] < _COARSENESS[weight_format]
        return replace(settings, quantize_frozen=weight_format) if finer else settings

    return apply


def _smaller(side: int) -> Callable[[MemorySettings], MemorySettings]:
    return lambda settings: replace(settings, patch_min=side) if settings.patch_min > side else settings


def _batch_of_one(settings: MemorySettings) -> MemorySettings:
    config = settings.config
    if config.batch_size == 1:
        return settings
    return replace(settings, config=replace(config, batch_size=1, accumulation=config.accumulation * config.batch_size))


CHANGES: tuple[Change, ...] = (  # those that do not change the result come first
    Change("switch `checkpointing` on", _config(checkpointing=True)),
    Change("set `activation_budget` to 0", _config(activation_budget=0.0)),
    Change("set `batch_size` to 1, and `accumulation` that much higher", _batch_of_one),
    Change("set `storage` to chunked", _store_in_chunks),
    Change("set `patch_min` to 256", _smaller(256)),
    Change("set `quantize_frozen` to int8", _frozen_quantised("int8")),
    Change("set `quantize_frozen` to fp8", _frozen_quantised("fp8")),  # rounds more; for hosts that have no int8
    Change("set `quantize_kept` to int8", _quantised("int8")),
    Change("set `quantize_kept` to fp8", _quantised("fp8")),
    Change("set `quantize_frozen` to 4-bit", _frozen_quantised("4-bit")),  # these blocks train no adapters
    Change("set `quantize_kept` to 4-bit", _quantised("4-bit")),
    Change("set `patch_min` to 128", _smaller(128)),
)


def phase_peaks(needs: MemoryNeeds) -> dict[str, int]:
    """Return the counted peak of each phase of the run, in bytes."""
    counts = zip(PHASES, (needs.selecting, needs.precomputing, needs.training), strict=True)
    return {phase: count.peak for phase, count in counts if count is not None}


def peak_of(settings: MemorySettings, needs: MemoryNeeds) -> int:
    """Return the peak of the phases that must fit.

    The probe is left out if nothing is measured. A host that cannot load a whole model for sampling streams it, so the probe
    is slow there rather than impossible; it is shown, but a run is not refused for it.
    """
    return max(peak for phase, peak in phase_peaks(needs).items() if phase != PHASES[0])


def fits(peak: int, available: int) -> bool:
    """Return whether a counted peak fits into the available bytes."""
    return peak <= largest_that_fits(available)


def largest_that_fits(available: int) -> int:
    """Return the largest counted peak that fits into the available bytes; the rest is the margin."""
    return int(available / (1.0 + MARGIN))


def changes_that_fit(
    settings: MemorySettings,
    available: int,
    count: Callable[[MemorySettings], MemoryNeeds],
    formats: Collection[str] = tuple(_COARSENESS),
) -> tuple[list[Change], MemoryNeeds] | None:
    """Return the smallest change that makes a run fit, and what the run then needs; several if one is not enough.

    Args:
        settings: Settings that do not fit.
        available: Available bytes.
        count: Settings -> what a run with them needs.
        formats: Formats that the host offers for the kept weights.

    Returns:
        None if all changes together are not enough.
    """
    count = cache(count)  # several changes may lead to the same settings
    changed_by = [(change, change.apply(settings)) for change in CHANGES]
    useful = [change for change, to in changed_by if to is not settings and _offered(to, formats)]
    for change in useful:
        needs = count(change.apply(settings))
        if fits(peak_of(settings, needs), available):
            return [change], needs
    taken: list[Change] = []
    changed, before = settings, phase_peaks(count(settings))
    for change in useful:
        further = change.apply(changed)
        needs = count(further)
        peaks = phase_peaks(needs)
        if peaks == before:  # an earlier change already covers it, or this model has nothing to gain from it
            continue
        changed, before, taken = further, peaks, [*taken, change]
        if fits(peak_of(changed, needs), available):
            return _effective(taken, settings), needs
    return None


def _effective(changes: Sequence[Change], settings: MemorySettings) -> list[Change]:
    """Return the changes without those that a later one overwrites."""
    left = list(changes)
    for change in changes:
        others = [other for other in left if other is not change]
        if _all_of(others, settings) == _all_of(left, settings):
            left = others
    return left


def _all_of(changes: Iterable[Change], settings: MemorySettings) -> MemorySettings:
    for change in changes:
        settings = change.apply(settings)
    return settings


def _offered(settings: MemorySettings, formats: Collection[str]) -> bool:
    return settings.quantize_kept in formats and (not settings.frozen or settings.quantize_frozen in formats)


def room_of_card(card: str) -> int:
    """Return the bytes that a run may use on a preset card.

    Raises:
        InvalidInputError: If the card is not one of :data:`CARDS`.
    """
    if card not in CARDS:
        raise InvalidInputError(f"preset must be off or one of {', '.join(CARDS)}, got {card!r}.")
    share, more = RESERVED
    return round((CARDS[card] * (1 - share) - more) * 2**30)


def with_spare_used(
    settings: MemorySettings, available: int, count: Callable[[MemorySettings], MemoryNeeds]
) -> MemorySettings:
    """Return settings that fit and use spare memory to keep activations instead of recomputing them.

    The result stays the same, and a step is faster. Half a GiB is the smallest increment.

    Args:
        settings: Settings that fit.
        available: Available bytes.
        count: Settings -> what a run with them needs.
    """
    if not settings.config.checkpointing:
        return settings

    def possible(**fields: Any) -> MemorySettings | None:
        changed = _config(**fields)(settings)
        return changed if fits(peak_of(changed, count(changed)), available) else None

    everything = possible(checkpointing=False, activation_budget=0.0)
    if everything:
        return everything
    spare = largest_that_fits(available) - peak_of(settings, count(settings))
    budget = settings.config.activation_budget + spare // _PORTION * _PORTION
    while budget > settings.config.activation_budget:
        larger = possible(activation_budget=budget)
        if larger:
            return larger
        budget -= _PORTION
    return settings


@dataclass(frozen=True)
class Verdict:
    """Whether a training will fit.

    Attributes:
        starts: Whether it can start at all.
        problem: What is wrong, one sentence for users; empty if nothing is.
    """

    starts: bool
    problem: str = ""


def verdict_on_training(peak: int, weights: int, streamed: int, available: int, place: str) -> Verdict:
    """Judge a training by its counted peak.

    A host without room for all weights keeps them in host memory and moves each to the device when it is used. So a run
    that does not fit with all weights is slow; one that does not fit even without them fails.

    Args:
        peak: Bytes of everything alive at the same time, weights included.
        weights: The weights' share of it.
        streamed: Bytes of the weights that are on the device at the same time if all of them are moved.
        available: Free bytes on the device.
        place: The device's name.
    """
    if fits(peak, available):
        return Verdict(True)
    has = f"{place} has {format_bytes(available)} free"
    least = peak - weights + streamed
    if fits(least, available):
        return Verdict(
            True,
            f"Training needs {format_bytes(peak)} and {has}, so weights are moved in every step, which is slow.",
        )
    return Verdict(
        False, f"Training needs {format_bytes(least)} even without most of its weights, and {has}. It was not started."
    )

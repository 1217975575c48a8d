"""A memory plan as text."""

from __future__ import annotations

from ...accounting.memory_needs import MemoryNeeds
from ...accounting.plan import MARGIN, PHASES, Change, MemorySettings, fits, peak_of, phase_peaks
from ...units import format_bytes
from ..models.more_trained import MoreTrained

Found = tuple[list[Change], MemoryNeeds] | None  # result of changes_that_fit
AsRun = tuple[MemorySettings, MemoryNeeds] | None  # the settings handed on, and what the run needs with them


def advice(found: Found) -> str:
    """Return the result of :func:`changes_that_fit` as a sentence."""
    if found is None:
        return "No change of settings makes it fit. Skip more blocks at Select Blocks, or load a quantised model."
    return f"It fits if you {' and '.join(change.text for change in found[0])}."


def report(
    settings: MemorySettings,
    needs: MemoryNeeds,
    available: int,
    place: str,
    run: AsRun,
    *,
    draws: int = 1,
    speed: float | None = None,
) -> str:
    """Return the plan as text for users, several lines.

    Args:
        settings, needs: The run and what it needs.
        available: Bytes of the device that it may use.
        place: The device's name.
        run: The settings that the node hands on, and what the run needs with them; None if no settings fit.
        draws: Number of training examples, all of which are precomputed.
        speed: Operations per second of the device, see ``throughput``; None for a card that is not in this machine.
    """
    lines = [verdict(settings, needs, available, place, run), ""]
    for phase, peak in phase_peaks(needs).items():
        note = ""
        if phase == "training":
            note = f", of which weights {format_bytes(needs.training.weights)}"
        if phase == PHASES[0] and not settings.measured:
            note = ", only with method attention mask"
        lines.append(f"{phase}: {format_bytes(peak)} on the device{note}")
    lines.append(f"host memory besides the model: up to {format_bytes(needs.host)}")
    lines.append(f"disk: {format_bytes(needs.disk)} of residuals" if needs.disk else "disk: no residuals")
    lines.append(_time(needs, draws, speed))
    lines.append("")
    lines.append(
        "Counted, not estimated: bytes of all tensors that are alive at the same time. The device needs more than "
        f"that, so the verdict adds {MARGIN:.0%}."
    )
    return "\n".join(lines)


def patches_line(sizes: str, peak: int, available: int) -> str:
    """Return what Train Patch Adapters needs as a sentence.

    Args:
        sizes: Its `patch_sizes`.
        peak: Bytes on the device.
        available: Bytes of the device that it may use.
    """
    result = "fits" if fits(peak, available) else "does not fit: lower its `batch_size` or the size of its pictures"
    return f"patch adapters, {sizes}, trained by Train Patch Adapters: {format_bytes(peak)} on the device, {result}."


def more_trained_line(more: MoreTrained) -> str:
    """Return a choice that trains more blocks, and learns more, as a sentence or two."""
    formats = ", `quantize_kept` and `quantize_frozen` 4-bit" if more.in_4_bit else ""
    return (
        f"Room to train more blocks: `method` manual, `front` {more.skipped}, `back` {more.frozen}{formats} takes "
        f"{format_bytes(more.peak)} and {more.work:.2g} times the work of a step. On our small model it learned more, at "
        "`learning_rate` 1e-4."
    )


def _time(needs: MemoryNeeds, draws: int, speed: float | None) -> str:
    parts = {"a training step": needs.training.operations}
    if needs.precomputing is not None:
        parts[f"precomputing {draws:,} training examples"] = draws * needs.precomputing.operations
    counted = ", ".join(f"{what} {operations / 1e12:,.3g} TFLOP" for what, operations in parts.items())
    if speed is None:
        return f"work: {counted}. How long that takes on another card is not known."
    times = ", ".join(f"{what} {_duration(operations / speed)}" for what, operations in parts.items())
    return f"work: {counted}. At least: {times}, at the {speed / 1e12:,.3g} TFLOP/s of this device's matrix products."


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100.0 else f"{seconds / 60:,.0f} min"


def verdict(settings: MemorySettings, needs: MemoryNeeds, available: int, place: str, run: AsRun) -> str:
    """Return the plan in a sentence or two: what is needed as set, what there is, and what the run needs."""
    peak = peak_of(settings, needs)
    needed = f"Needs {format_bytes(peak)} as set, you have {format_bytes(available)} ({place})"
    if run is None:
        return f"{needed}. {advice(None)} Or set `kept_weights` to streamed, which is slow."
    enough, changes = fits(peak, available), settings.changes_to(run[0])
    if not changes:
        return f"{needed}: fits."
    uses = f"With `settings` connected, this run uses {', '.join(changes)}: {format_bytes(peak_of(*run))}, fits"
    return f"{needed}: fits. {uses} and is faster." if enough else f"{needed}. {uses}."

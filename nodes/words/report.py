"""What was done, in sentences for the user."""

from __future__ import annotations

from ...blockskip_core.zoodip.settings import WordSettings
from ...blockskip_core.zoodip.signal import Signal
from ...blockskip_core.zoodip.training import WordResult, WordTraining
from .prepare import PreparedWord


def summary_line(word: str, settings: WordSettings, result: WordResult) -> str:
    """Return the line that stays under the node."""
    passes = result.steps * settings.passes_per_step
    return f"{word}: {result.steps} steps, {passes:,} forward passes, loss {_first(result):.4f} to {_last(result):.4f}"


def report(
    run: PreparedWord, settings: WordSettings, signal: Signal | None, training: WordTraining, result: WordResult,
    word: str, peak: str,
) -> str:  # fmt: skip
    """Return the report."""
    moved = ((training.word - run.first) / run.layout.sizes).square().mean().sqrt().item()
    shapes = ", ".join(f"{part.name} {part.vectors} x {part.width}" for part in run.layout.parts)
    lines = [
        f"Write {word} in a prompt. It stands for {shapes}, and began as {run.request.like_word!r}.",
        f"{result.steps} steps with {settings.passes_per_step} forward passes each, {result.resumed_at} of them by an "
        "earlier run.",
        f"Loss of the first tenth {_first(result):.4f}, of the last tenth {_last(result):.4f}. Every step has another "
        "picture and noise level, so single losses say little.",
        f"The word moved by {moved:.2f} of an ordinary word's numbers.",
        f"Perturbation {settings.perturbation:.3g}, step size {settings.step_size:.3g}; {_checked(run, signal, result)}.",
        f"Highest memory use {peak}.",
        run.memory,
        *result.problems,
    ]
    return "\n".join(line for line in lines if line)


def _checked(run: PreparedWord, signal: Signal | None, result: WordResult) -> str:
    if signal is None:
        was = run.request.check_perturbation and result.resumed_at
        return "checked by the earlier run" if was else "not checked"
    measured = ", ".join(f"{value:.2f} at {mu:.3g}" for mu, value in signal.agreement.items())
    return f"slopes agree {measured} ({signal.passes} forward passes)"


def _tenth(result: WordResult) -> int:
    return max(1, len(result.losses) // 10)


def _first(result: WordResult) -> float:
    size = _tenth(result)
    return sum(result.losses[:size]) / size


def _last(result: WordResult) -> float:
    size = _tenth(result)
    return sum(result.losses[-size:]) / size

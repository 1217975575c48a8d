"""How large a perturbation must be: a quantised model's loss moves in jumps, and small differences are only rounding.

Slopes along the same directions are measured with several perturbations. Their rounding errors are independent, so if
two perturbations agree, both follow the loss's slope; if rounding dominates one, it agrees with none. The agreement
of a perturbation is the mean correlation of its slopes with those of the others.

Difference from the paper: it finds by trial that models in 4 bits need a perturbation ten times as large (arXiv
2503.14868).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainingError
from .directions import generator_of
from .examples import Example

FACTORS = (0.5, 1.0, 2.0)
"""The perturbations compared, as multiples of the one asked for."""
PAIRS = 24
"""Number of (example, direction) pairs; correlations of pure noise have a standard deviation of about 0.2."""
ENOUGH = 0.9
LEAST = 0.7

Losses = Callable[[Tensor, Example], Tensor]
"""(words of shape (K, numbers), example) -> losses of shape (K,)"""


@dataclass(frozen=True)
class Signal:
    """What was measured.

    Attributes:
        perturbation: The one to use.
        agreement: Perturbation -> mean correlation of its slopes with those of the others.
        passes: Forward passes spent.
    """

    perturbation: float
    agreement: dict[float, float]
    passes: int


def agreements(slopes: Tensor) -> Tensor:
    """Return the mean correlation of each row with the other rows, shape (rows,).

    Args:
        slopes: Shape (rows, pairs). A row without any variation has correlation 0 with all.
    """
    centred = slopes - slopes.mean(1, keepdim=True)
    units = torch.nan_to_num(centred / centred.norm(dim=1, keepdim=True))
    correlations = units @ units.T
    return (correlations.sum(1) - correlations.diagonal()) / (len(slopes) - 1)


def require_finite(losses: Tensor, when: str) -> None:
    """Raise TrainingError if a loss is not finite; ``when`` says where it was computed."""
    if not torch.isfinite(losses).all():
        raise TrainingError(
            f"The loss {when} is not finite. Load the model in bf16 or fp32, or lower step_size and perturbation."
        )


def measure_signal(
    losses: Losses,
    word: Tensor,
    sizes: Tensor,
    perturbation: float,
    examples: Sequence[Example],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Signal:
    """Return the perturbation to use: the one asked for, or another if only that follows the loss.

    Args:
        losses: The loss of words on an example.
        word, sizes: The word and the unit of each of its numbers, shape (numbers,).
        perturbation: The one asked for.
        examples: One for each pair.
        seed: Determines the directions.
        progress: Called with (pairs done, pairs); may raise to interrupt.

    Raises:
        TrainingError: If none follows the loss, or a loss is not finite.
    """
    tried = [perturbation * factor for factor in FACTORS]
    slopes = measured_slopes(losses, word, sizes, tried, examples, seed, progress)
    found = dict(zip(tried, agreements(slopes).tolist(), strict=True))
    return Signal(_chosen(found, perturbation), found, 2 * slopes.numel())


def measured_slopes(
    losses: Losses,
    word: Tensor,
    sizes: Tensor,
    perturbations: Sequence[float],
    examples: Sequence[Example],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return central differences along one direction for each example, shape (perturbations, examples), float64.

    Arguments and errors as in :func:`measure_signal`.
    """
    columns = []
    for number, example in enumerate(examples):
        direction = sizes * torch.randn(len(word), generator=generator_of("signal", seed, number))
        steps = torch.stack([mu * direction for mu in perturbations])
        values = losses(torch.cat([word + steps, word - steps]), example).double().cpu()
        require_finite(values, "before the first step")
        above, below = values.chunk(2)
        columns.append((above - below) / (2.0 * torch.tensor(perturbations, dtype=torch.float64)))
        if progress:
            progress(number + 1, len(examples))
    return torch.stack(columns, 1)


def _chosen(agreement: dict[float, float], wanted: float) -> float:
    best = max(agreement, key=lambda mu: agreement[mu])
    if not agreement[best] >= LEAST:
        measured = ", ".join(f"{value:.2f} at {mu:.3g}" for mu, value in agreement.items())
        raise TrainingError(
            f"The model's loss does not follow small changes of the word: slopes agree only {measured}, and at least "
            f"{LEAST:g} is needed. Load the weights in another format; with 4-bit weights and 4-bit inputs it moves in jumps."
        )
    return wanted if agreement[wanted] >= ENOUGH else best

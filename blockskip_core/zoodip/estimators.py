"""Gradients from losses at perturbed words, without backward passes.

With directions e_1 .. e_n ~ N(0, I), a perturbation mu, and L the loss on one example:

    forward difference   1/n sum_i (L(theta + mu e_i) - L(theta)) / mu  e_i                       n + 1 forward passes
    leave-one-out        1/n sum_i (L(theta + mu e_i) - mean over j != i of L(theta + mu e_j)) / mu  e_i        n
    central              1/n sum_i (L(theta + mu e_i) - L(theta - mu e_i)) / (2 mu)  e_i                       2 n

Each has the expectation of the gradient, up to O(mu) for the first two and O(mu^2) for the last. Leave-one-out needs no
pass at theta, and its baseline is independent of e_i, so it adds no bias.

Sources: forward difference: ZOODiP (arXiv 2503.14868), Eq. 3. Leave-one-out: Kool et al., "Buy 4 REINFORCE samples,
get a baseline for free" (2019). Central: Spall, IEEE Trans. Automatic Control 37(3), 1992, with normal directions.

Difference from the paper: its code perturbs the half-precision word in place and takes the perturbation back
afterwards, which drifts. Here every point is computed from one float32 word that the perturbation does not touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InvalidInputError

EstimatorName = Literal["leave-one-out", "forward difference", "central"]
ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)


@dataclass(frozen=True)
class Estimator:
    """A way to estimate a gradient.

    Attributes:
        least: The smallest number of directions.
        passes: Number of directions -> forward passes of a step.
        points: (word, steps mu e_i) -> the words to evaluate, shape (passes, numbers).
        slopes: (losses, mu) -> the slope along each direction, shape (n,).
    """

    least: int
    passes: Callable[[int], int]
    points: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, float], Tensor]

    def gradient(self, losses: Tensor, directions: Tensor, perturbation: float) -> Tensor:
        """Return the estimate in the dtype of the directions.

        Args:
            losses: At :attr:`points`, in their order, shape (passes,); float64, because differences of nearly equal
                losses are taken.
            directions: Shape (n, numbers).
            perturbation: mu, in the unit of the gradient's coordinates.

        Returns:
            Shape (numbers,).
        """
        slopes = self.slopes(losses, perturbation).to(directions.dtype)
        return slopes @ directions / len(directions)


def _leave_one_out(losses: Tensor, perturbation: float) -> Tensor:
    others = (losses.sum() - losses) / (len(losses) - 1)
    return (losses - others) / perturbation


def _forward_difference(losses: Tensor, perturbation: float) -> Tensor:
    return (losses[1:] - losses[0]) / perturbation


def _central(losses: Tensor, perturbation: float) -> Tensor:
    above, below = losses.chunk(2)
    return (above - below) / (2.0 * perturbation)


_BY_NAME: dict[str, Estimator] = {
    "leave-one-out": Estimator(2, lambda n: n, lambda word, steps: word + steps, _leave_one_out),
    "forward difference": Estimator(
        1, lambda n: n + 1, lambda word, steps: torch.cat([word[None], word + steps]), _forward_difference
    ),
    "central": Estimator(1, lambda n: 2 * n, lambda word, steps: torch.cat([word + steps, word - steps]), _central),
}


def estimator(name: EstimatorName) -> Estimator:
    """Return an estimator by its name.

    Raises:
        InvalidInputError: If the name is not known.
    """
    if name not in _BY_NAME:
        raise InvalidInputError(f"The estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}.")
    return _BY_NAME[name]


def published_divisor(dimensions: int, directions: int) -> float:
    """Return the number by which the paper's code divides a gradient: the expected length of an estimate of a unit one.

    For Adam only its epsilon notices. ``dimensions`` is without those that the subspace removes.
    """
    return math.sqrt((dimensions + directions - 1) / directions)

"""Adam on one row of numbers, with its state as plain tensors.

Source: Kingma and Ba (arXiv 1412.6980), Algorithm 1. The paper's code (ZOODiP) uses epsilon 1e-3 instead of 1e-8.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)


class Adam:
    """Turns gradients into update directions.

    Args:
        numbers: Length of the row.
        epsilon: Added to the root of the second moment.
        dtype: Of the moments.
    """

    def __init__(self, numbers: int, epsilon: float, dtype: torch.dtype = torch.float32) -> None:
        self._epsilon = epsilon
        self._steps = 0
        self._mean, self._square = torch.zeros(2, numbers, dtype=dtype)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of the next step, shape (numbers,): subtract it times the step size."""
        self._steps += 1
        beta, beta2 = BETAS
        self._mean = beta * self._mean + (1.0 - beta) * gradient
        self._square = beta2 * self._square + (1.0 - beta2) * gradient.square()
        mean = self._mean / (1.0 - beta**self._steps)
        square = self._square / (1.0 - beta2**self._steps)
        return mean / (square.sqrt() + self._epsilon)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the moments; the number of steps is that of the run."""
        return {"mean": self._mean.clone(), "square": self._square.clone()}

    def restore(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue after some steps."""
        self._mean, self._square, self._steps = state["mean"].clone(), state["square"].clone(), steps

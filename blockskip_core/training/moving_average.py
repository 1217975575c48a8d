"""An exponential moving average (EMA) of the LoRA's values: what a run shows, saves and returns in their place.

    a_0 = x_0        a_n = d_n a_(n-1) + (1 - d_n) x_n        d_n = min(decay, (1 + n) / (10 + n))

x_n are the values after n optimiser steps. Averages of iterates are due to Polyak and Juditsky (SIAM J. Control Optim.
30(4), 1992); for diffusion models they are usual since DDPM (arXiv 2006.11239, App. B). The decay's warm-up is that of
TensorFlow's ``tf.train.ExponentialMovingAverage`` with ``num_updates``: without it a short run would mostly keep its
initial values. A and B are averaged separately, as every trainer does; that is not the average of the products B A.

d_n depends on n alone, so a state needs no counter; and processes that make the same steps have the same average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """Return d_n, the share of the previous average that step n, from 1, keeps."""
    return min(decay, (1 + step) / (10 + step))


class MovingAverage:
    """The average of some parameters, in their dtype (float32 or wider) and on their device.

    Showing it exchanges the parameters' storage, so it copies nothing, and the optimiser's own values stay untouched.

    Args:
        parameters: What is averaged; their present values are a_0.
        decay: Below 1. With 0 there is no average: nothing is stored, and every method does nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._values: list[Tensor] = []
        self.restart()

    @torch.inference_mode(False)  # hosts run nodes in inference mode, and tensors created there cannot be updated
    def restart(self) -> None:
        """Take the parameters' present values as the average."""
        if self._decay:
            self._values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the values after ``step`` optimiser steps."""
        for value, parameter in zip(self._values, self._parameters, strict=bool(self._decay)):
            value.lerp_(parameter, 1.0 - decay_at(step, self._decay))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Give the parameters the average within the context, and their own values afterwards, whatever happens."""
        own = [parameter.data for parameter in self._parameters] if self._decay else []
        try:
            self._put(self._values)
            yield
        finally:
            self._put(own)

    def keep(self) -> None:
        """Give the parameters the average for good, and forget their own values."""
        self._put(self._values)
        self._values = []

    def _put(self, values: Sequence[Tensor]) -> None:
        for value, parameter in zip(values, self._parameters, strict=False):  # no values: no average
            parameter.data = value

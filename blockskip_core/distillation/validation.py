"""The error of coarse calls by noise level, on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .distilled import Distilled
from .examples import Batch

Call = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


class HeldOut:
    """Held-out examples and the teacher's answers to them, computed once.

    Args:
        model: The running model.
        batches: Of one noise level each, level by level.
    """

    def __init__(self, model: Distilled, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        with torch.no_grad():
            self._taught = [self._answer(model.teacher, batch) for batch in batches]

    def errors(self, call: Call) -> tuple[float, ...]:
        """Return the relative error of a call's velocity at every noise level.

        The root of the mean square of the difference from the teacher's velocity, relative to that of the velocity.
        """
        differences: dict[float, float] = {}
        sizes: dict[float, float] = {}
        with torch.no_grad(), self._model.attached():
            for batch, taught in zip(self._batches, self._taught, strict=True):
                level = float(batch.sigmas[0])
                answer = self._answer(call, batch)
                sigma = batch.sigmas[:, None, None, None]
                wrong = ((answer - taught) / sigma).double().square().sum().item()
                size = ((batch.noisy - taught) / sigma).double().square().sum().item()
                differences[level], sizes[level] = differences.get(level, 0.0) + wrong, sizes.get(level, 0.0) + size
        return tuple((differences[level] / size) ** 0.5 if size else 0.0 for level, size in sizes.items())

    def _answer(self, call: Call, batch: Batch) -> Tensor:
        device = self._model.device
        return call(batch.noisy.to(device), batch.sigmas.to(device), batch.captions).float().cpu()

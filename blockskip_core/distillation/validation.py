"""The error of coarse calls by noise level, on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .distilled import Distilled
from .examples import Batch

Call = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
# (calls of a pass over the examples done, all of them); first with 0 done; may raise to interrupt
OnCall = Callable[[int, int], None]


class HeldOut:
    """Held-out examples and the teacher's answers to them, computed once.

    Args:
        model: The running model.
        batches: Of one noise level each, level by level.
        on_call: Told of every call of the model, also of those of the teacher; see ``OnCall``.
    """

    def __init__(self, model: Distilled, batches: Sequence[Batch], on_call: OnCall = lambda done, total: None) -> None:
        self._model, self._batches, self._on_call = model, batches, on_call
        with torch.no_grad():
            self._taught = list(self._answers(model.teacher))

    def errors(self, call: Call) -> tuple[float, ...]:
        """Return the relative error of a call's velocity at every noise level.

        The root of the mean square of the difference from the teacher's velocity, relative to that of the velocity.
        """
        differences: dict[float, float] = {}
        sizes: dict[float, float] = {}
        with torch.no_grad(), self._model.attached():
            for batch, taught, answer in zip(self._batches, self._taught, self._answers(call), strict=True):
                level = float(batch.sigmas[0])
                sigma = batch.sigmas[:, None, None, None]
                wrong = ((answer - taught) / sigma).double().square().sum().item()
                size = ((batch.noisy - taught) / sigma).double().square().sum().item()
                differences[level], sizes[level] = differences.get(level, 0.0) + wrong, sizes.get(level, 0.0) + size
        return tuple((differences[level] / size) ** 0.5 if size else 0.0 for level, size in sizes.items())

    def _answers(self, call: Call) -> Iterator[Tensor]:
        device, total = self._model.device, len(self._batches)
        self._on_call(0, total)
        for done, batch in enumerate(self._batches, 1):
            yield call(batch.noisy.to(device), batch.sigmas.to(device), batch.captions).float().cpu()
            self._on_call(done, total)

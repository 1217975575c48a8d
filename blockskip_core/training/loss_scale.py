"""Loss scaling: in float16 the small numbers of a backward pass become zero unless the loss is made larger first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INITIAL = 1024.0  # gradients of a mean over a whole picture are near float16's smallest numbers
_MOST_OVERFLOWS = (
    20  # steps in a row whose gradient overflows in float16; each halves the scale, so this ends far below 1
)
_PREFIX = "loss scale/"  # of its numbers in a state


class LossScale:
    """torch's GradScaler for a model in float16; with any other dtype nothing is changed.

    Args:
        device: The model's. On ``meta`` nothing is scaled: values there mean nothing, and every step would be skipped.
        dtype: The one that the model computes in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        enabled = dtype == torch.float16 and device.type != "meta"
        self._scaler = torch.amp.GradScaler(device.type, init_scale=_INITIAL, enabled=enabled)
        self._in_a_row = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss for ``backward``."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give all gradients their true size, once per step and before they are clipped."""
        self._scaler.unscale_(optimizer)

    def overflowed(self, norm: float) -> bool:
        """Return whether a step is to be skipped because its gradient overflowed, from the norm of the gradient.

        It is False, and the norm not finite, if smaller scales do not help, or nothing is scaled: the training diverges.
        """
        if math.isfinite(norm) or not self._scaler.is_enabled():
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        return self._in_a_row < _MOST_OVERFLOWS

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimiser's step, or skip it and halve the scale if a gradient overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def numbers(self) -> dict[str, Any]:
        """Return its part of a training state; nothing if nothing is scaled."""
        return {_PREFIX + name: x for name, x in self._scaler.state_dict().items()}

    def restore(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Take its part from a training state's numbers, if there is one, and return the others."""
        own = {name.removeprefix(_PREFIX): x for name, x in numbers.items() if name.startswith(_PREFIX)}
        if own:
            self._scaler.load_state_dict(own)
        return {name: x for name, x in numbers.items() if not name.startswith(_PREFIX)}


def remark_on(overflows: int) -> list[str]:
    """Return a sentence on skipped steps, if there were any."""
    if not overflows:
        return []
    return [
        f"{overflows} steps were skipped because gradients overflowed in float16; a model in bf16 does not have this "
        "problem."
    ]

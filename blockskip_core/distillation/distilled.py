"""What a distillation needs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn


class Distilled(Protocol):
    """A running model that teaches its own coarse calls.

    All calls take noisy latents (B, C, H, W), noise levels (B,) and a caption's index per row, on the model's device,
    and return clean estimates (B, C, H, W).
    """

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        ...

    def teacher(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with the model's own patches; called without gradients and outside :meth:`attached`."""
        ...

    def student(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with coarse patches and all that is trained."""
        ...

    def untrained(self, noisy: Tensor, sigmas: Tensor, captions: Sequence[int]) -> Tensor:
        """Return the estimate with coarse patches and nothing trained or measured."""
        ...

    def attached(self) -> AbstractContextManager[object]:
        """Return a context that holds a student's forward and its backward."""
        ...

    def text_length(self, caption: int) -> int:
        """Return the number of text tokens; all rows of a batch have the same number."""
        ...

    def check_gradients(self) -> None:
        """Require, after the first backward, that all that is trained has a gradient.

        Raises:
            TrainingError: If something has none.
        """
        ...

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of everything that is trained, on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of :meth:`state_dict`, bit for bit."""
        ...

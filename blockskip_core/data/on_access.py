"""Sequences of tensors that are created on access, because all of them together would take too much memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from torch import Tensor


class OnAccess(Sequence[Tensor]):
    """A sequence that creates each tensor when it is accessed, and keeps none."""

    @abstractmethod
    def one(self, index: int) -> Tensor:
        """Create the tensor at an index."""

    def taken(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the tensors at some indices, in their order."""
        return [self.one(index) for index in indices]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return self.taken(range(*index.indices(len(self))))
        return self.one(index)

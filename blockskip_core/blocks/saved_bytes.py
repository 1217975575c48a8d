"""Count how much memory a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class SavedBytes:
    """Counts the memory kept for a backward pass: each storage once, without parameters."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[StorageWeakRef] = set()  # a weak reference keeps its storage's identity from being reused

    def add(self, value: Any) -> None:
        """Count a tensor that is kept; anything else is ignored."""
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or isinstance(value._base, nn.Parameter):
            return
        storage = value.untyped_storage()
        identity = StorageWeakRef(storage)  # not the address, which tensors on `meta` lack
        if identity not in self._seen:
            self._seen.add(identity)
            self.total += storage.nbytes()

    @contextmanager
    def counting(self, *, dropped: bool = False) -> Iterator[None]:
        """Count what autograd saves in this context.

        Args:
            dropped: Whether nothing is to be saved, because there will be no backward pass.
        """

        def pack(tensor: Tensor) -> Tensor | None:
            self.add(tensor)
            # Detached: an operation that saves its own output would otherwise keep itself alive, in a cycle that
            # Python's garbage collector does not see.
            return None if dropped else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

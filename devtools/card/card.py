"""The emulated card: its tensors, and their conversion to and from CPU tensors over the same bytes."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import guard, kernels, torch_cuda
from .memory import Memory
from .pinned import PinnedMemory
from .streams import DEVICE, Streams

CPU = torch.device("cpu")


class Card:
    """A card whose bytes are in host memory. There is one per process; its size may change, see :class:`Memory`.

    Each storage of the card wraps a *buffer*, a CPU tensor, which lives as long as the storage does.

    Args:
        total: Bytes.
        name: What ``torch.cuda.get_device_name`` gives.
        capability: Compute capability; below (8, 0) there is no bf16, below (8, 9) no fp8 matrix product.

    Attributes:
        memory, streams, pinned, generator: See ``torch_cuda.AnswersForCuda``.
        where: The device of the buffers and of the kernels that compute on them.
    """

    pinned: PinnedMemory
    where = CPU

    def __init__(
        self, total: int, *, name: str = "Emulated GeForce RTX 3060", capability: tuple[int, int] = (8, 6)
    ) -> None:
        self.name, self.capability = name, capability
        self.memory, self.streams = Memory(total), Streams()
        self.generator = torch.Generator().manual_seed(0)
        self._buffers: dict[int, Tensor] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._origins: dict[int, tuple[int, str]] | None = None

    def install(self) -> Card:
        """Make ``cuda:0`` this card, for the rest of the process.

        Raises:
            CardUnavailable: If no card can be emulated here.
        """
        library = guard.install()
        self.pinned = PinnedMemory(library)
        kernels.register(self)
        torch_cuda.install(self)
        return self

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the card with newly allocated memory."""
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        num_bytes = extent * dtype.itemsize
        self.memory.take(num_bytes)
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.where)
        return self.tensor(self._storage(buffer), dtype, size, stride)

    def up(self, made: Tensor) -> Tensor:
        """Return a tensor of the card that takes over the bytes of a CPU kernel's result."""
        if made.untyped_storage().nbytes() > 2 * max(1, made.numel() * made.element_size()):
            made = made.clone()  # a view into a larger storage, all of which would be counted
        buffer = torch.empty(0, dtype=torch.uint8, device=self.where).set_(made.untyped_storage())
        self.memory.take(buffer.nbytes)
        return self.tensor(self._storage(buffer), made.dtype, made.size(), made.stride(), made.storage_offset())

    def down(self, tensor: Tensor) -> Tensor:
        """Return a CPU tensor over the bytes of one of the card's tensors."""
        plain = torch.empty(0, dtype=tensor.dtype, device=self.where)
        plain.set_(self.buffer(tensor).untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        if tensor.is_conj():
            plain = plain.conj()
        return torch._neg_view(plain) if tensor.is_neg() else plain

    def buffer(self, tensor: Tensor) -> Tensor:
        """Return the buffer below one of the card's tensors."""
        return self._buffers[tensor.untyped_storage()._cdata]

    def tensor(
        self,
        storage: torch.UntypedStorage,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int],
        offset: int = 0,
    ) -> Tensor:
        """Return a tensor over a storage of the card."""
        described = {
            "dtype": dtype, "size": tuple(size), "stride": tuple(stride), "storage_offset": offset, "device": DEVICE,
        }  # fmt: skip
        return torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(described, storage)

    def kernels_by_hand(self) -> dict[str, Callable[..., Any]]:
        """Return the kernels that only this kind of card needs, by operation name; each takes the card first."""
        return {}

    def over_pages(self, buffer: Tensor) -> Tensor:
        """Return a uint8 tensor of the card over bytes that their owner counts itself and may take away."""
        return self.tensor(self._storage(buffer, counted=False), torch.uint8, buffer.shape, (1,))

    def keep_origins(self) -> None:
        """From now on remember where each storage is created. Slow; helps to find what holds memory."""
        self._origins = {}

    def origins(self) -> list[tuple[int, int, str]]:
        """Return (bytes, number, stack) of the live storages, those with the most bytes first."""
        bytes_by, count = Counter[str](), Counter[str]()
        for num_bytes, stack in (self._origins or {}).values():
            bytes_by[stack] += num_bytes
            count[stack] += 1
        return [(num_bytes, count[stack], stack) for stack, num_bytes in bytes_by.most_common()]

    def _address(self, buffer: Tensor) -> int:
        """Return the address of a storage over a buffer."""
        return buffer.data_ptr()

    def _storage(self, buffer: Tensor, *, counted: bool = True) -> torch.UntypedStorage:
        """Return a storage over a buffer; if its bytes are counted here, the caller has already taken them."""
        address, num_bytes = self._address(buffer), buffer.untyped_storage().nbytes() if counted else buffer.nbytes
        storage = torch._C._construct_storage_from_data_pointer(address, DEVICE, num_bytes)
        key = storage._cdata
        self._buffers[key] = buffer
        if self._origins is not None:
            self._origins[key] = num_bytes, "".join(traceback.format_stack(limit=16)[:-3])
        if counted and num_bytes:
            self.streams.allocated(address, num_bytes)

        def gone(_: weakref.ref) -> None:
            del self._buffers[key], self._watched[key]
            if self._origins is not None:
                self._origins.pop(key, None)
            if counted and num_bytes:
                self.streams.freed(address)
                self.memory.give_back(num_bytes)

        self._watched[key] = weakref.ref(storage, gone)
        return storage

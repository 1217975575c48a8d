"""A card whose tensors have shapes but no data: models of any size run on it in seconds and in little memory.

Its buffers are on torch's ``meta`` device, whose kernels compute the shapes of results but not the numbers. Everything
else is as on the other card: tensors are ordinary tensors on ``cuda:0``, their bytes are limited and counted, and the
code that moves a model between host and card does its real work.

When a program reads numbers, it gets values that let it continue: a number is 1, a condition is true, two tensors are
equal, and a copy to the host gives zeros. Host tensors are ordinary CPU tensors, but the operating system gives them
memory page by page on the first write: weights that are only moved and never written take none.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
from typing import Any

import torch
import torch._meta_registrations
from torch import Tensor

from .card import Card

_FIRST_ADDRESS, _STEP = 2**46, 2**40  # no storage is larger than a step
_LARGE = 2**20  # bytes; from this size on, returning pages is worth a system call
_LIBC = ctypes.CDLL(None, use_errno=True)


class ShapesCard(Card):
    """A :class:`Card` whose tensors have no data. It takes the same arguments."""

    where = torch.device("meta")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._addresses = itertools.count(_FIRST_ADDRESS, _STEP)

    def kernels_by_hand(self) -> dict[str, Callable[..., Any]]:
        """Return the kernels whose results depend on numbers."""
        return {"_local_scalar_dense": _number, "copy_": _copy, "equal": _equal}

    def over_pages(self, buffer: Tensor) -> Tensor:
        """Return a tensor of the card of the same size, without data."""
        return super().over_pages(torch.empty_like(buffer, device=self.where))

    def _address(self, buffer: Tensor) -> int:
        """Return an unused address, which only distinguishes storages."""
        return next(self._addresses)


def zero(tensor: Tensor) -> None:
    """Fill a CPU tensor with zeros; afterwards a large one takes no memory.

    Pages returned to the operating system read as zeros and take memory only when they are written again.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if not tensor.is_contiguous() or last - first < _LARGE:
        tensor.detach().zero_()
        return
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, end - last)
    if _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"The pages of a tensor of {tensor.nbytes} bytes cannot be given back")


def _number(card: Card, tensor: Tensor) -> bool | int | float | complex:
    return torch.ones((), dtype=tensor.dtype).item()


def _equal(card: Card, one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape


def _copy(card: Card, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between host and card or within the card; only the shapes are checked."""
    if torch.broadcast_shapes(to.shape, source.shape) != to.shape:
        raise RuntimeError(f"The shape {tuple(source.shape)} cannot be copied to {tuple(to.shape)}")
    if to.is_cpu:
        zero(to)
    return to

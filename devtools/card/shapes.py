"""A card whose tensors have shapes and no bytes: models of any size run on it, in seconds and in little memory.

Its buffers are on torch's ``meta`` device, whose kernels know what an operation makes but not the numbers. All else is as on
the other card: tensors are ordinary ones of ``cuda:0``, their bytes are limited and counted, and whatever moves a model
between host and card does its real work.

What a program asks of the numbers is answered so that it carries on: a number is 1, a condition holds, two tensors are equal,
and what is copied to the host is zeros. The host's own tensors are ordinary ones of the CPU, but the operating system gives
them memory page by page, when it is first written: weights that are only moved, and never written, take none.
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
_LARGE = 2**20  # bytes, from which on giving pages back is worth a call of the operating system
_LIBC = ctypes.CDLL(None, use_errno=True)


class ShapesCard(Card):
    """A :class:`Card` whose tensors have no bytes. Arguments are those of a Card."""

    where = torch.device("meta")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._addresses = itertools.count(_FIRST_ADDRESS, _STEP)

    def kernels_by_hand(self) -> dict[str, Callable[..., Any]]:
        """Return those kernels whose results depend on numbers."""
        return {"_local_scalar_dense": _number, "copy_": _copy, "equal": _equal}

    def over_pages(self, buffer: Tensor) -> Tensor:
        """Return a tensor of the card with as many bytes, of which none are there."""
        return super().over_pages(torch.empty_like(buffer, device=self.where))

    def _address(self, buffer: Tensor) -> int:
        """Return an address that nothing is at: it only tells storages apart."""
        return next(self._addresses)


def zero(tensor: Tensor) -> None:
    """Fill a tensor of the CPU with zeros; a large one takes no memory after that.

    Pages that are given back to the operating system read as zeros, and take memory only when they are written again.
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
    """Copy between host and card or on the card: only the shapes must fit."""
    if torch.broadcast_shapes(to.shape, source.shape) != to.shape:
        raise RuntimeError(f"The shape {tuple(source.shape)} cannot be copied to {tuple(to.shape)}")
    if to.is_cpu:
        zero(to)
    return to

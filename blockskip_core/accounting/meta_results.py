"""What an operation returns on the ``meta`` device, worked out once for inputs of the same shapes.

For most operations torch does this in Python, which takes many times as long as creating the result, and a model's
blocks repeat the same operations on the same shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_REMEMBERED = 2**14
_HASHED_BY_VALUE = (
    int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class _Form(NamedTuple):
    """All that a plain tensor on ``meta`` is."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Return a new tensor of this form."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


class _Constant(NamedTuple):
    """An argument that is no tensor. The type distinguishes 1 from 1.0 and from True, which are equal."""

    kind: type
    value: Hashable


class _NotDescribed(Exception):
    """An argument is something else."""


def result_on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what an operation returns, without running it again for inputs that differ only in their memory.

    Args:
        func: The operation, an ``OpOverload``.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        A new tensor, or None if the operation must be run: because an input is not on ``meta`` or not plain, or because
        the operation writes to an input, or returns a view or several tensors.
    """
    try:
        described = tuple(map(_described, args))
        named = tuple((name, _described(value)) for name, value in kwargs.items())
    except _NotDescribed:
        return None
    form = _form_of_result(func, described, named)
    return None if form is None else form.tensor()


@lru_cache(_REMEMBERED)
def _form_of_result(func: Any, args: tuple[Hashable, ...], kwargs: tuple[tuple[str, Hashable], ...]) -> _Form | None:
    schema = func._schema
    if len(schema.returns) != 1 or any(given.alias_info for given in (*schema.arguments, *schema.returns)):
        return None
    inputs, named = [_made(arg) for arg in args], {name: _made(arg) for name, arg in kwargs}
    given = {tensor.untyped_storage()._cdata for tensor in tensors_in((inputs, list(named.values())))}
    if not given:
        return None  # it creates a tensor, which is as fast
    result = func(*inputs, **named)
    if not _is_plain(result) or result.untyped_storage()._cdata in given:
        return None
    form = _form_of(result)
    is_whole = result.untyped_storage().nbytes() == form.tensor().untyped_storage().nbytes()
    return form if is_whole and not result.storage_offset() else None


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if not _is_plain(value):
            raise _NotDescribed
        return _form_of(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if not isinstance(value, _HASHED_BY_VALUE):
        raise _NotDescribed
    return _Constant(type(value), value)


def _made(described: Any) -> Any:
    """Return an argument of this description."""
    if isinstance(described, _Form):
        return described.tensor()
    return described.value if isinstance(described, _Constant) else [_made(part) for part in described]


def _form_of(tensor: Tensor) -> _Form:
    return _Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a tensor on ``meta`` without properties that :class:`_Form` lacks."""
    if type(value) not in (Tensor, nn.Parameter) or not value.is_meta or value.layout != torch.strided:
        return False
    return not (value.is_conj() or value.is_neg())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments or results, and in lists of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)

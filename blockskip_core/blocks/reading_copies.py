"""Run blocks that overwrite their tokens so that gradients are correct.

Some blocks add to their tokens by methods whose results they do not use (``x.addcmul_(y, gate)``), after a norm has kept
the tokens for its backward: LTX-Video's and LTX-2's, for example. Running them out of place would lose the additions.
Instead they run on copies of their tokens, and whatever else reads these is given a copy of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .out_of_place import with_backward

_OPERATORS: Mapping[Any, Callable[..., Tensor]] = {
    torch.Tensor.__iadd__: torch.add,
    torch.Tensor.__imul__: torch.mul,
    torch.Tensor.__isub__: torch.sub,
    torch.Tensor.__itruediv__: torch.div,
}
"""Unlike methods, these always bind their result to the name they are applied to."""

_KEEPS_NOTHING = frozenset((
    "__get__", "__hash__", "__len__", "dim", "size", "stride", "numel", "nelement", "element_size", "is_floating_point",
    "is_contiguous", "untyped_storage", "data_ptr", "type", "__getitem__", "view", "reshape", "unbind", "transpose",
    "permute", "unsqueeze", "squeeze", "split", "chunk", "expand", "flatten", "unflatten", "movedim", "narrow", "detach",
))  # fmt: skip
"""Functions without a copy of their arguments, to save time: those that read no values, and most views."""


class ReadingCopies(TorchFunctionMode):
    """Context in which functions read copies of some tensors, so that these may be overwritten afterwards.

    All versions of the tokens that a backward needs exist in the out-of-place mode as well, so this needs no more memory.
    Other tensors that a block overwrites after a function has kept them are not protected. Autograd notices that, unless
    the block is checkpointed, so a block must be tried once without (``hosts.models.following``).

    Args:
        tensors: The tensors that may be overwritten; each must have memory of its own.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = tuple(tensors)  # as long as they exist, no other tensor gets their memory
        self._guarded = {_memory(tensor) for tensor in tensors}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("inplace"):  # torch.nn.functional.silu and its like
            kwargs = {**kwargs, "inplace": False}
        if func in _OPERATORS:
            return func(*args, **kwargs) if self._is_guarded(args[0]) else _OPERATORS[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if _overwrites(name):
            return func(args[0], *self._copied(args[1:])[0], **kwargs)
        func = with_backward(func)
        if name in _KEEPS_NOTHING or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given, copies = self._copied(args)
        named, more = self._copied(kwargs.values())
        result = func(*given, **dict(zip(kwargs, named, strict=True)))
        if {_memory(copy) for copy in (*copies, *more)}.isdisjoint(map(_memory, _tensors_in(result))):
            return result
        return func(*args, **kwargs)  # a view, which must be one of the tensor itself

    def _is_guarded(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _memory(value) in self._guarded

    def _copied(self, values: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
        """Return values with copies of the guarded tensors among them, also within lists, and the copies."""
        given: list[Any] = []
        copies: list[Tensor] = []
        for value in values:
            if self._is_guarded(value):
                copies.append(value.clone())
                given.append(copies[-1])
            elif type(value) in (list, tuple) and any(isinstance(entry, Tensor) for entry in value):
                inner, more = self._copied(value)
                given.append(type(value)(inner))
                copies += more
            else:
                given.append(value)
        return given, copies


def _overwrites(name: str) -> bool:
    """Return whether a function of this name overwrites its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for entry in result:
            yield from _tensors_in(entry)

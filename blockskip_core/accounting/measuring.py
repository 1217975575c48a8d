"""Count what a run needs: bytes of tensors alive at the same time, and operations. No GPU is needed.

:class:`Counting` looks at every operation on its way to a kernel. On the ``meta`` device tensors have shapes but no
memory, so a step of a model of any size is counted in seconds and in little memory; on any other device the counter
observes a real run. Three conventions:

    bytes        Each storage once, from the operation that creates it until nothing refers to it. The allocator's
                 rounding and fragmentation, and the workspaces of kernels, are not included. ``meta`` plays the role
                 of the device; tensors on the CPU are host memory.
    operations   Multiplications and additions of matrix products and attention, forward, recomputed and backward, by
                 torch's own formulas: one multiply-add is 2.
    kernels      On ``meta``, inside the contexts of ``fused_kernels``, as a GPU's fused kernels do it.

Values on ``meta`` mean nothing. A loop that asks for a number gets 1, and tensors that are moved to the CPU become
zeros, so that the real loops can be counted and no second version of them is needed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .meta_results import result_on_meta, tensors_in

aten = torch.ops.aten
_META = torch.device("meta")
_WHOLE: set[Any] = set()  # operations that torch does not compose of others, as far as they have been met


class Counting(TorchDispatchMode):
    """Context in which operations and live bytes are counted, for one device, or for ``meta`` and the CPU.

    Tensors that existed before are not counted, nor are views of them; see :meth:`hold`.

    Attributes:
        operations: Since the context was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self._live: dict[str, int] = defaultdict(int)
        self._peak: dict[str, int] = defaultdict(int)
        self._watched: dict[int, weakref.ref] = {}

    def live(self, device: torch.device) -> int:
        """Return the bytes alive now on a type of device."""
        return self._live[device.type]

    def peak(self, device: torch.device) -> int:
        """Return the most bytes alive at one time since the last :meth:`reset_peak`."""
        return self._peak[device.type]

    def reset_peak(self) -> None:
        """Restart the peaks from what is alive now."""
        self._peak = defaultdict(int, self._live)

    def hold(self, tensors: Any) -> None:
        """Count tensors that were created outside the context, from now until they are freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._watch(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None and func not in _WHOLE:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _WHOLE.add(func)
        result = _placeholder(func, args, kwargs)
        if result is None:
            result = result_on_meta(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
            self._watch_new(func, result, (*args, *kwargs.values()))
        elif isinstance(result, Tensor):
            self._watch(result)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        return result

    def _watch_new(self, func: Any, result: Any, inputs: Sequence[Any]) -> None:
        """Count the tensors of a result that share no memory with the operation's inputs."""
        given = {_identity(tensor) for tensor in tensors_in(inputs)}
        if func is aten.lift_fresh.default and result.ndim:
            given = set()  # torch.tensor passes on what it has just created; single numbers are left out
        for tensor in tensors_in(result):
            if _identity(tensor) not in given:
                self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        if type(tensor) is not Tensor and is_traceable_wrapper_subclass(
            tensor
        ):  # its own storage has no memory; the tensors inside it do
            parts: Any = tensor
            for name in parts.__tensor_flatten__()[0]:
                self._watch(getattr(tensor, name))
            return
        storage, key = tensor.untyped_storage(), _identity(tensor)
        if key in self._watched:
            return
        kind, size = tensor.device.type, storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self._live[kind] -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self._live[kind] += size
        self._peak[kind] = max(self._peak[kind], self._live[kind])


def _identity(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory; not the address, which ``meta`` tensors lack."""
    return tensor.untyped_storage()._cdata


def _placeholder(func: Any, args: tuple, kwargs: dict) -> float | Tensor | None:
    """Return what an operation gives that needs the values of a ``meta`` tensor; None if it needs none."""
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return 1.0
    if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device", _META).type == "cpu":
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


def _attention_operations(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_operations(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,  # torch has no formula for the CPU's
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
}

"""The emulated card's kernels: those of the CPU, on the same bytes.

Every operation that has a kernel for CUDA or for the CPU gets one here, in Python, under the dispatch key CUDA. The
kernel converts the card's tensors to CPU tensors, calls the operation on them, and converts new results back. Autograd,
views, autocast and everything else above the kernels are torch's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from .streams import DEVICE

if TYPE_CHECKING:
    from .card import Card

aten = torch.ops.aten

VIEWS = frozenset({  # torch creates them without touching memory, on any device
    "_conj", "_neg_view", "_reshape_alias", "alias", "as_strided", "detach", "diagonal", "expand", "is_set_to", "lift",
    "lift_fresh", "permute", "record_stream", "select", "set_", "slice", "split", "squeeze", "t", "transpose", "unfold",
    "unsqueeze", "view", "view_as_complex", "view_as_real",
})  # fmt: skip
INDEXED = frozenset({  # their indices may be on the CPU
    "_index_put_impl_", "_unsafe_index", "_unsafe_index_put", "index", "index_put", "index_put_",
})  # fmt: skip
COPIES = frozenset({"copy_", "_copy_from"})  # between any two devices
READ_BY_HOST = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero"})  # the host has to wait for them
COMPOSITE = frozenset({  # no kernel under either key, but must not be decomposed
    "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "convolution", "convolution_backward", "copy_",
})  # fmt: skip


def register(card: Card) -> None:
    """Register kernels under the dispatch key CUDA for the rest of the process."""
    card.registered = library.Library("aten", "IMPL")  # kept, because deleting it would unregister the kernels
    by_hand = _by_hand(card)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about every kernel that is replaced
        for full_name in torch._C._dispatch_get_all_op_names():
            name = full_name.removeprefix("aten::")
            if name != full_name and name not in by_hand:
                _register_one(card, name)
        for name, kernel in by_hand.items():
            card.registered.impl(name, kernel, "CUDA")
        card.registered.impl("scaled_dot_product_attention", by_hand["scaled_dot_product_attention"], "AutogradCUDA")


def _register_one(card: Card, name: str) -> None:
    base, _, overload = name.partition(".")
    has_kernel = any(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for key in ("CUDA", "CPU"))
    if base in VIEWS or not (has_kernel or name in COMPOSITE):
        return
    packet = getattr(aten, base, None)
    operation = getattr(packet, overload or "default", None)  # a few cannot be called from Python
    if operation is not None:
        card.registered.impl(name, Kernel(card, operation), "CUDA")


class Kernel:
    """An operation of torch on tensors of the card.

    Args:
        card: The card whose tensors it takes.
        operation: An overload of ``torch.ops.aten``.
    """

    def __init__(self, card: Card, operation: torch._ops.OpOverload) -> None:
        self._card, self._operation = card, operation
        self._schema = operation._schema
        self._base = self._schema.name.removeprefix("aten::")
        arguments = self._schema.arguments
        self._tensor_places = [i for i, argument in enumerate(arguments) if str(argument.type) == "Tensor"]
        self._is_random = any(argument.name == "generator" for argument in arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
            return self._run(_numbers_as_tensors(args, self._tensor_places), kwargs)

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        call = _Call(self._card)
        lowered = [call.lowered(value) for value in args]
        named = {name: call.lowered(value) for name, value in kwargs.items()}
        self._require_one_device(call, args)
        if self._card.streams.are_judged:
            self._report_to_streams(args, kwargs)
        if self._is_random:
            with call.random_numbers(named, kwargs.get("generator")):
                result = self._operation(*lowered, **named)
        else:
            result = self._operation(*lowered, **named)
        call.adopt_new_sizes()
        return call.raised(result)

    def _require_one_device(self, call: _Call, args: Sequence[Any]) -> None:
        if call.from_cpu is None or not call.pairs or self._base in COPIES:
            return
        if self._base in INDEXED and not any(isinstance(value, Tensor) and value.is_cpu for value in args):
            return
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({self._schema.name}, a tensor of shape {tuple(call.from_cpu.shape)} is on the CPU)"
        )

    def _report_to_streams(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        values = [*args, *(kwargs.get(argument.name) for argument in self._schema.arguments[len(args) :])]
        for argument, value in zip(self._schema.arguments, values, strict=True):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_written else reads).extend(_tensors_of_card(value))
        self._card.streams.launch(str(self._schema), reads, writes)
        if self._base in READ_BY_HOST or (self._base in COPIES and self._is_waited_for(args, kwargs)):
            self._card.streams.host_waits_for(self._card.streams.current())

    def _is_waited_for(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether the host waits for a copy to finish: a blocking one between card and host."""
        asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return not asynchronous and any(value.is_cpu for value in args[:2])


class _Call:
    """One call of a kernel, with the tensors that were converted for it.

    Attributes:
        pairs: (CPU tensor, the card's tensor over the same bytes), by the identity of the first.
        from_cpu: An argument on the CPU that is not a scalar, if there is one.
    """

    def __init__(self, card: Card) -> None:
        self._card = card
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.from_cpu: Tensor | None = None

    def lowered(self, value: Any) -> Any:
        """Return an argument in the form that the CPU kernel takes."""
        if isinstance(value, Tensor):
            if value.is_cuda:
                plain = self._card.down(value)
                self.pairs[id(plain)] = plain, value
                return plain
            if value.dim():
                self.from_cpu = value
            return value.to(self._card.where)
        elif isinstance(value, (list, tuple)):
            return [self.lowered(part) for part in value]
        elif isinstance(value, torch.device) and value.type == "cuda":
            return self._card.where
        return value

    def random_numbers(self, named: dict[str, Any], generator: torch.Generator | None) -> _RandomNumbers:
        """Replace a generator of the card, including the default one, by a CPU generator with the same state."""
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        numbers = _RandomNumbers(generator)
        named["generator"] = self._card.generator if generator is None else numbers.of_cpu
        return numbers

    def adopt_new_sizes(self) -> None:
        """Resize the card's tensors whose CPU counterpart the kernel has resized, as it may with ``out=``."""
        for plain, own in self.pairs.values():
            if plain.size() != own.size():
                own.resize_(plain.size())
                self._card.down(own).copy_(plain)

    def raised(self, result: Any) -> Any:
        """Return a CPU kernel's result as the card's tensors."""
        if isinstance(result, Tensor):
            return self._raised_tensor(result)
        if isinstance(result, (list, tuple)):
            return type(result)(map(self.raised, result)) if type(result) in (list, tuple) else result
        return result

    def _raised_tensor(self, result: Tensor) -> Tensor:
        if result is self.from_cpu:  # a copy to the host returns its destination
            return result
        known = self.pairs.get(id(result))
        if known is not None:
            return known[1]
        where = result.untyped_storage()._cdata
        for plain, own in self.pairs.values():
            if plain.untyped_storage()._cdata == where:
                storage, offset = own.untyped_storage(), result.storage_offset()
                return self._card.tensor(storage, result.dtype, result.size(), result.stride(), offset)
        made = self._card.up(result.resolve_conj().resolve_neg())
        if self._card.streams.are_judged:
            self._card.streams.launch("output", (), (made,))
        return made


class _RandomNumbers:
    """Copies the state of a generator of the card to a CPU generator, and back afterwards."""

    def __init__(self, of_card: torch.Generator | None) -> None:
        self._of_card = of_card
        self.of_cpu = torch.Generator()

    def __enter__(self) -> None:
        if self._of_card is not None:
            self.of_cpu.set_state(self._of_card.get_state())

    def __exit__(self, *error: object) -> None:
        if self._of_card is not None:
            self._of_card.set_state(self.of_cpu.get_state())


def _tensors_of_card(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors_of_card(part)]
    return [value] if isinstance(value, Tensor) and value.is_cuda else []


def _numbers_as_tensors(args: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    """Turn numbers back into tensors, because the dispatcher unpacks scalar tensors when it calls Python."""
    if not any(place < len(args) and isinstance(args[place], (bool, int, float)) for place in places):
        return args
    other = next((value for value in args if isinstance(value, Tensor)), None)

    def as_tensor(value: float) -> Tensor:
        if other is None or isinstance(value, bool) or other.is_complex() or other.dtype == torch.bool:
            return torch.tensor(value)
        if other.is_floating_point():
            return torch.tensor(value, dtype=other.dtype)
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else None)

    return [
        as_tensor(value) if place in places and isinstance(value, (bool, int, float)) else value
        for place, value in enumerate(args)
    ]


# --- kernels by hand -----------------------------------------------------------------------------------------------------


def _by_hand(card: Card) -> dict[str, Callable[..., Any]]:
    """Return kernels for operations that the CPU's kernels cannot do, by operation name."""

    def below_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
                return kernel(card, *args, **kwargs)

        return run

    return {
        "empty.memory_format": below_autograd(_empty),
        "empty_strided": below_autograd(_empty_strided),
        "resize_": below_autograd(_resize),
        "scaled_dot_product_attention": _attention,
        "_fused_rms_norm_backward": _rms_norm_backward,
        "_has_compatible_shallow_copy_type": lambda one, other: True,
        "_efficientzerotensor": lambda size, **_: torch.zeros(size, device=DEVICE),
        **{name: below_autograd(kernel) for name, kernel in card.kernels_by_hand().items()},
    }


def _empty(card: Card, size: Sequence[int], *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    laid_out = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return card.empty(laid_out.size(), laid_out.stride(), dtype)


def _empty_strided(card: Card, size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return card.empty(size, stride, dtype or torch.get_default_dtype())


def _resize(card: Card, tensor: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    """Move the tensor to new memory and copy its old content."""
    fresh = card.empty(size, torch.empty(size, device="meta").stride(), tensor.dtype)
    kept = min(tensor.untyped_storage().nbytes(), fresh.untyped_storage().nbytes())
    card.buffer(fresh)[:kept].copy_(card.buffer(tensor)[:kept])
    return tensor.set_(fresh.untyped_storage(), 0, size, fresh.stride())


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute attention with the CPU's fused kernel, whose backward pass keeps as little memory as a card's kernel.

    On a real card, C++ code that asks the driver chooses the kernel, so the choice is made here.
    """
    for name, other in (("key", k), ("value", v), ("attn_mask", attn_mask)):
        if other is not None and other.device != q.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(aten::scaled_dot_product_attention, {name} is on {other.device})"
            )
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None and attn_mask.dtype != q.dtype:
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{attn_mask.dtype} and  query.dtype: {q.dtype} instead."
        )
    if q.dim() != 4:
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _rms_norm_backward(
    grad: Tensor, x: Tensor, normalized_shape: Sequence[int], rstd: Tensor, weight: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Do the same steps in the same order as autograd on a CPU, which has no fused kernel, for bit-equal results."""
    with torch._C._AutoDispatchBelowAutograd():
        dims = list(range(-len(normalized_shape), 0))
        exact, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
        scaled = grad if weight is None else grad * weight
        of_mean = -0.5 * (scaled * exact).sum(dims, keepdim=True) * rstd.pow(3)
        of_square = of_mean.expand_as(exact) / math.prod(normalized_shape)
        of_x = (scaled * rstd + of_square * (exact * 2)).to(x.dtype)
        of_weight = (grad * (exact * rstd)).sum_to_size(weight.shape).to(weight.dtype) if mask[1] else None
        return of_x, of_weight

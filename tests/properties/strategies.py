"""Every possible input of a node: what its widgets offer, what they refuse, and what only a link can supply.

Allowed numbers that would take long (a million steps) are left out; numbers out of range are included.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

HUGE = (2**31, 2**63, 2**64, 10**30)
ODD_INTEGERS = st.sampled_from([-1, 0, -(2**63), -(2**64), *HUGE]) | st.integers(-5, 5)
ODD_NUMBERS = (
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 0.0, -0.0, -1.0]) | st.floats()
)
STRANGERS = st.sampled_from(
    [None, "", "abc", b"", 0, 1.5, True, (), {}, {"a": 1}, SimpleNamespace(), torch.zeros(2), float("nan"), object, 1j]
)
NAMES = st.sampled_from(
    ["", ".", "..", "/", "~", "a/", "../a", "../../a", "a/../../b", "loras/../../x", "/etc/a", "C:\\a", "\\\\host\\a", "a\0b",
     "a\nb", "con", "nul", "aux.txt", "%year%/%x%", "a" * 300, "b/" * 200 + "a", "\u202eevil", "\ud800", "é" * 130, "你好",
     "x_00001_", "-1", "loras/blockskip", "blockskip/residuals", "blockskip/runs/x", "a?b*c", "a:b", "a|b", " ", "-rf", "a.safetensors"]
) | st.text(max_size=40)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """Possible values of one input: those that work and are fast, and all others."""

    usual: st.SearchStrategy
    odd: st.SearchStrategy
    optional: bool = False


def drawn(data: st.DataObject, inputs: dict[str, Input], most_odd: int = 2) -> dict[str, Any]:
    """Draw all inputs of a node, at most ``most_odd`` of them odd, because a refused input hides the others' effects."""
    odd = data.draw(st.lists(st.sampled_from(sorted(inputs)), max_size=most_odd, unique=True))
    values = {}
    for name, kind in inputs.items():
        if name in odd:
            values[name] = data.draw(kind.odd)
        elif not kind.optional or data.draw(st.booleans()):
            values[name] = data.draw(kind.usual)
    return values


def widgets(node: type, usual: dict[str, st.SearchStrategy]) -> dict[str, Input]:
    """The widgets of a node. ``usual``: values other than its default that a widget may have."""
    found = {}
    for declared in node.define_schema().inputs:
        if not hasattr(declared, "default"):
            continue  # not a widget
        odd = _odd_widget(declared)
        values = usual.get(declared.id, st.just(declared.default))
        several = st.lists(values | odd, max_size=3).filter(lambda found: len(found) != 1)
        found[declared.id] = Input(values, odd | STRANGERS | several, bool(declared.optional))
    return found


def _odd_widget(declared: Any) -> st.SearchStrategy:
    kind = declared.get_io_type()
    if kind == "INT":
        return ODD_INTEGERS | st.just((declared.max or 0) + 1)
    if kind == "COMBO":
        return NAMES | st.sampled_from(declared.options)
    return {"FLOAT": ODD_NUMBERS | ODD_INTEGERS, "BOOLEAN": st.booleans(), "STRING": NAMES}[kind]


def socket(right: Any, odd: st.SearchStrategy = STRANGERS, *, optional: bool = False) -> Input:
    """An input that takes one value."""
    return Input(st.just(right), odd | st.sampled_from([[], [right, right], [right, None]]), optional)


def odd_tensors() -> st.SearchStrategy:
    """Tensors of unusual shapes, types and numbers."""
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 16, 17]), max_size=5)
    types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
    fills = st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e4])
    return st.builds(lambda shape, dtype, fill: torch.full(shape, fill).nan_to_num(0.0).to(dtype) if not dtype.is_floating_point
                     else torch.full(shape, fill, dtype=dtype), shapes, types, fills)  # fmt: skip


def pictures(*, optional: bool = False) -> Input:
    """Lists of IMAGEs."""
    sizes = st.sampled_from([(32, 32), (33, 47), (64, 64), (40, 200)])
    usual = st.builds(
        lambda size, count, colours: torch.full((count, *size, colours), 0.5),
        sizes,
        st.integers(1, 2),
        st.integers(3, 4),
    )
    odd_sizes = st.tuples(st.sampled_from([0, 1, 3]), st.sampled_from([1, 16, 31, 32, 70]), st.sampled_from([1, 32, 300]),
                          st.sampled_from([0, 1, 2, 3, 4, 5]))  # fmt: skip
    fills = st.sampled_from([0.0, 1.0, -3.0, 7.0, float("nan"), float("inf")])
    odd = st.builds(torch.full, odd_sizes, fills) | odd_tensors() | STRANGERS
    return Input(st.lists(usual, min_size=1, max_size=1), st.lists(usual | odd, max_size=3), optional)


def conditionings(width: int, *, optional: bool = False) -> Input:
    """Lists of CONDITIONINGs with texts of this width."""
    pooled = st.fixed_dictionaries(
        {},
        optional={
            "pooled_output": st.just(torch.zeros(1, width)),
            "guidance": st.just(3.5),
            "reference_latents": st.just([torch.ones(1, 4, 3, 5)]),
        },
    )
    entry = st.builds(lambda length, settings: [torch.ones(1, length, width), settings], st.integers(1, 9), pooled)
    names = st.sampled_from(
        ["area", "mask", "guidance", "start_percent", "attention_mask", "hooks", "pooled_output", "x", 3,
         "reference_latents", "reference_latents_method"]
    )  # fmt: skip
    settings = st.dictionaries(names, odd_tensors() | STRANGERS | st.lists(odd_tensors(), max_size=2), max_size=2)
    odd_texts = st.tuples(
        st.integers(0, 2), st.integers(0, 5), st.sampled_from([0, 1, width - 1, width, width + 1, 4 * width])
    )
    odd_entry = (
        st.builds(lambda tensor, settings: [tensor, settings], odd_tensors(), pooled)
        | st.builds(lambda shape, settings: [torch.ones(shape), settings], odd_texts, pooled)
        | st.builds(lambda entry, settings: [entry[0], {**entry[1], **settings}], entry, settings)
        | STRANGERS
    )
    odd = st.lists(entry | odd_entry, max_size=2) | STRANGERS
    return Input(
        st.lists(st.lists(entry, min_size=1, max_size=1), min_size=1, max_size=1), st.lists(odd, max_size=3), optional
    )


def conditioning(width: int) -> Input:
    """One CONDITIONING, for a node that takes no lists."""
    several = conditionings(width)
    return Input(several.usual.map(lambda found: found[0]), several.odd.map(lambda found: found[0] if found else None))


def loras(good: dict[str, torch.Tensor]) -> st.SearchStrategy:
    """LORA_MODELs: a good one, and the same with names, shapes and numbers changed."""
    name = (
        st.sampled_from(sorted(good)) | st.text(max_size=30) | st.sampled_from([f"{key}.x" for key in sorted(good)[:3]])
    )
    changed = st.dictionaries(name, odd_tensors() | st.sampled_from([good[key] for key in sorted(good)]), max_size=3)
    dropped = st.sets(st.sampled_from(sorted(good)), max_size=3)

    def change(put: dict, drop: set) -> dict:
        return {key: tensor for key, tensor in {**good, **put}.items() if key not in drop}

    return st.builds(change, changed, dropped) | changed | STRANGERS

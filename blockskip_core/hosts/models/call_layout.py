"""Where the tokens are in one call of a block whose two rows differ in the latent only.

Where a tensor's rows are equal it does not depend on the picture: that tells image tokens from text tokens, also within one
tensor, and shows the batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...blocks.token_places import Joined, Key, ListLayout, TokenPlace
from ...errors import UnsupportedModelError

ROWS = 2
ROUNDING = 0.02  # a row's place in its batch may change its last bits, of which bf16 has few


def are_tokens(value: Any) -> bool:
    """Return whether an argument may hold tokens."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3


def tensors_given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Key, Tensor]:
    """Return what may be tokens among the arguments of a call, and among the entries of tuples and lists."""
    found: dict[Key, Tensor] = {}
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in named:
        if are_tokens(value):
            found[(name,)] = value
        elif type(value) in (tuple, list):
            found.update({(name, index): entry for index, entry in enumerate(value) if are_tokens(entry)})
    return found


@dataclass(frozen=True)
class CallLayout:
    """What one call of a block shows.

    Attributes:
        layout: Where the tokens are.
        num_img, num_txt: Number of image and of text tokens; None if text is not in the stream.
        width: Width of a token.
    """

    layout: ListLayout
    num_img: int
    num_txt: int | None
    width: int


def layout_of_call(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, block: str) -> CallLayout:
    """Return where the tokens are in one call of a block with two rows; see the module.

    Raises:
        UnsupportedModelError: If they cannot be told.
    """
    given = tensors_given(args, kwargs)
    returned, container = _entries(result, block)
    places: list[tuple[TokenPlace, Tensor]] = []
    for key, tensor in returned.items():
        taken = {place.key for place, _ in places}
        alike = [k for k, x in given.items() if x.shape == tensor.shape and k not in taken]
        if not alike:
            raise UnsupportedModelError(
                f"The block {block} returns a tensor of shape {tuple(tensor.shape)} that it was not given, so it cannot "
                "be skipped. Choose another model."
            )
        match = min(alike, key=lambda k: (given[k] - tensor).norm().item())  # blocks add to their tokens
        places.append((TokenPlace(match, key, _batch_axis(tensor, block)), given[match]))
    passed = tuple(place for place, tensor in places if not tensor.numel())
    places = [(place, tensor) for place, tensor in places if tensor.numel()]
    kinds = [_kind(place, tensor) for place, tensor in places]
    images = [index for index, kind in enumerate(kinds) if kind != "text"]
    if len(images) != 1 or len(places) > 2:
        raise UnsupportedModelError(
            f"The block {block} has {len(images)} tensors of image tokens and {len(places) - len(images)} of text "
            "tokens, expected one of image tokens and at most one of text tokens, so it cannot be skipped. Choose "
            "another model."
        )
    (img, tokens), others = places[images[0]], [place for index, place in enumerate(places) if index not in images]
    differ = _differing(img, tokens)
    joined: Joined = ""
    if kinds[images[0]] == "both":
        joined = _order_of_rows(differ, block)
    num_img, num_txt = int(differ.sum()), int((~differ).sum()) + sum(len(_differing(*place)) for place in others)
    layout = ListLayout(img, others[0][0] if others else None, joined, container, passed)
    return CallLayout(layout, num_img, num_txt if joined or others else None, tokens.shape[-1])


def _entries(result: Any, block: str) -> tuple[dict[int | None, Tensor], tuple[type, int] | None]:
    """Return the tensors of a result by their keys, and what holds them."""
    if isinstance(result, Tensor):
        return {None: result}, None
    if type(result) in (tuple, list) and all(entry is None or isinstance(entry, Tensor) for entry in result):
        return {index: x for index, x in enumerate(result) if x is not None}, (type(result), len(result))
    raise UnsupportedModelError(
        f"The block {block} returns a {type(result).__name__}, expected a tensor or a tuple of tensors, so it cannot be "
        "skipped. Choose another model."
    )


def _batch_axis(tensor: Tensor, block: str) -> int:
    axes = [axis for axis, length in enumerate(tensor.shape[:-1]) if length == ROWS]
    if not axes:
        raise UnsupportedModelError(
            f"The block {block} gets tokens of shape {tuple(tensor.shape)} for {ROWS} pictures, which has no batch axis, "
            "so it cannot be skipped. Choose another model."
        )
    return axes[0]


def _differing(place: TokenPlace, tensor: Tensor) -> Tensor:
    """Return which tokens differ between the two rows by more than rounding, shape (N,)."""
    return differing_rows(*place.as_tokens(tensor.detach()))


def differing_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return which tokens of two rows, each (N, D), differ by more than rounding, shape (N,)."""
    one, other = one.float(), other.float()
    difference, size = (one - other).norm(dim=-1), torch.maximum(one.norm(dim=-1), other.norm(dim=-1))
    return difference > ROUNDING * size


def _kind(place: TokenPlace, tensor: Tensor) -> str:
    differ = _differing(place, tensor)
    return "image" if differ.all() else "both" if differ.any() else "text"


def _order_of_rows(differ: Tensor, block: str) -> Joined:
    count = int(differ.sum())
    if differ[:count].all():
        return "image first"
    if differ[-count:].all():
        return "text first"
    raise UnsupportedModelError(
        f"The block {block} gets {count} tokens that depend on the picture among {len(differ)}, and they are not together, "
        "so it cannot be skipped. Choose another model."
    )

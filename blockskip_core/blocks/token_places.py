"""Where a block's call and result hold tokens, written down as data, so that one class serves the blocks of any model.

A host writes such places in a table, or finds them by following a call (``hosts.models.following``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..model import CopiedCall, TokenStreams

Joined = Literal["", "image first", "text first"]
References = Literal["", "first", "last"]
Key = tuple[int | str] | tuple[int | str, int]
"""An argument, by its index or name, and for an entry of a tuple or list the index within."""


@dataclass(frozen=True)
class TokenPlace:
    """Where one tensor of tokens is in a block's call and in its result.

    Attributes:
        key: The argument, or the entry of an argument.
        result: Index in the result; None if the result is the tensor.
        batch: Index of the batch axis. The last axis is the width; all others count tokens.
    """

    key: Key
    result: int | None
    batch: int

    def entering(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the tensor of a call."""
        argument, *within = self.key
        value = args[argument] if isinstance(argument, int) else kwargs[argument]
        return value[within[0]] if within else value

    def leaving(self, result: Any) -> Tensor:
        """Return the tensor in a result."""
        return result if self.result is None else result[self.result]

    def as_tokens(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (B, N, D)."""
        return tensor.movedim(self.batch, 0).flatten(1, -2)

    def as_given(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return tokens (B, N, D) in the layout of ``like``; the inverse of :meth:`as_tokens`."""
        axes = like.movedim(self.batch, 0).shape[1:-1]
        return tokens.unflatten(1, axes).movedim(0, self.batch).contiguous()


@dataclass(frozen=True)
class ListLayout:
    """How the blocks of one list take and return their tokens.

    Attributes:
        img: The image tokens, or image and text tokens in one tensor.
        txt: The text tokens, if they are a tensor of their own.
        joined: The order of image and text in ``img``; empty if it holds no text.
        container: Class and number of entries of a result that is not a tensor.
        passed: Tensors without tokens, such as the sound of a picture, which are returned as they came.
        text_outputs: Linear layers of a block that change only its text tokens.
        unused: Linear layers of a block that change nothing.
        overwrites: Whether a block overwrites the tokens that it is given, so that it runs on copies.
        references: Where the tokens of reference pictures are in ``img``, if they are apart from a text in it.
    """

    img: TokenPlace
    txt: TokenPlace | None
    joined: Joined
    container: tuple[type, int] | None
    passed: tuple[TokenPlace, ...] = ()
    text_outputs: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    overwrites: bool = False
    references: References = ""

    @property
    def places(self) -> tuple[TokenPlace, ...]:
        """All tensors that the blocks take and return."""
        return (self.img, *(() if self.txt is None else (self.txt,)), *self.passed)


def with_tensors(args: tuple, kwargs: Mapping[str, Any], tensors: Mapping[Key, Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a call with some tensors, by their keys, in the places of those that are there."""

    def of(name: int | str, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(tensors.get((name, index), entry) for index, entry in enumerate(value))
        return tensors.get((name,), value)

    return tuple(of(index, value) for index, value in enumerate(args)), {
        name: of(name, x) for name, x in kwargs.items()
    }


def copied_call(layout: ListLayout, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall:
    """Return a call of a block with its tokens copied."""
    copies = {place.key: place.entering(args, kwargs).clone() for place in layout.places}
    return CopiedCall(*with_tensors(args, kwargs, copies), list(copies.values()))


class PlacedBlockIO:
    """Tokens of one list's blocks, by its layout.

    Args:
        layout: The layout.
        num_img: Returns the number of image tokens of the current call; asked only if they are joined with others.
        num_references: Returns the number of tokens of the current call's reference pictures, which count as text.
    """

    def __init__(
        self, layout: ListLayout, num_img: Callable[[], int], num_references: Callable[[], int] = lambda: 0
    ) -> None:
        self.layout, self._num_img, self._num_references = layout, num_img, num_references

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        place, text = self.layout.img, self.layout.txt
        txt = None if text is None else text.as_tokens(text.entering(args, kwargs))
        return self._split(place.as_tokens(place.entering(args, kwargs)), txt)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        place, text = self.layout.img, self.layout.txt
        txt = None if text is None else text.as_tokens(text.leaving(result))
        return self._split(place.as_tokens(place.leaving(result)), txt)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        place, text = self.layout.img, self.layout.txt
        tokens, txt = self._together(streams, args, kwargs)
        img = place.as_given(tokens, place.entering(args, kwargs))
        if self.layout.container is None:
            return img
        kind, length = self.layout.container
        entries: list[Tensor | None] = [None] * length
        given = None if text is None or txt is None else text.as_given(txt, text.entering(args, kwargs))
        returned = [(place, img), (text, given)]
        returned += [(passed, passed.entering(args, kwargs)) for passed in self.layout.passed]
        for stands_at, tokens_there in returned:
            if stands_at is not None and stands_at.result is not None:
                entries[stands_at.result] = tokens_there
        return kind(entries)

    def copied(self, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall | None:
        """Return the call with its tokens copied; None if the blocks do not overwrite them."""
        return copied_call(self.layout, args, kwargs) if self.layout.overwrites else None

    @property
    def _has_others(self) -> bool:
        """Whether a call's image tokens are in one tensor with others."""
        return bool(self.layout.joined or (self.layout.references and self._num_references()))

    def _first(self, total: int) -> int:
        """Return the place of the first image token among ``total`` tokens in one tensor."""
        references = self._num_references()
        if self.layout.joined == "text first":
            return total - self._num_img() - references * (self.layout.references == "last")
        return references * (self.layout.references == "first")

    def _split(self, tokens: Tensor, txt: Tensor | None) -> TokenStreams:
        if not self._has_others:
            return TokenStreams(tokens, txt)
        first = self._first(tokens.shape[1])
        last = first + self._num_img()
        parts = [tokens[:, :first], tokens[:, last:]] if txt is None else [txt, tokens[:, :first], tokens[:, last:]]
        others = [part for part in parts if part.shape[1]]
        return TokenStreams(tokens[:, first:last], others[0] if len(others) == 1 else torch.cat(parts, dim=1))

    def _together(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return what the block's tensors of image and of text tokens hold; the inverse of :meth:`_split`."""
        text, others = self.layout.txt, streams.txt
        if not self._has_others:
            return streams.img, others
        assert others is not None  # they were split by :meth:`_split`
        txt = None
        if text is not None:
            num_txt = text.as_tokens(text.entering(args, kwargs)).shape[1]
            txt, others = others[:, :num_txt], others[:, num_txt:]
        first = self._first(streams.img.shape[1] + others.shape[1])
        return torch.cat((others[:, :first], streams.img, others[:, first:]), dim=1), txt

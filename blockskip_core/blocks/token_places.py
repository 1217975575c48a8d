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
    """

    img: TokenPlace
    txt: TokenPlace | None
    joined: Joined
    container: tuple[type, int] | None
    passed: tuple[TokenPlace, ...] = ()
    text_outputs: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    overwrites: bool = False

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
        num_img: Returns the number of image tokens of the current call; asked only if they are joined with text.
    """

    def __init__(self, layout: ListLayout, num_img: Callable[[], int]) -> None:
        self.layout, self._num_img = layout, num_img

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
        tokens = streams.img
        if self.layout.joined:
            assert streams.txt is not None  # they were split by :meth:`_split`
            parts = (streams.img, streams.txt) if self.layout.joined == "image first" else (streams.txt, streams.img)
            tokens = torch.cat(parts, dim=1)
        img = place.as_given(tokens, place.entering(args, kwargs))
        if self.layout.container is None:
            return img
        kind, length = self.layout.container
        entries: list[Tensor | None] = [None] * length
        returned = [(place, img), (text, self._text(streams, args, kwargs))]
        returned += [(passed, passed.entering(args, kwargs)) for passed in self.layout.passed]
        for stands_at, tokens_there in returned:
            if stands_at is not None and stands_at.result is not None:
                entries[stands_at.result] = tokens_there
        return kind(entries)

    def copied(self, args: tuple, kwargs: Mapping[str, Any]) -> CopiedCall | None:
        """Return the call with its tokens copied; None if the blocks do not overwrite them."""
        return copied_call(self.layout, args, kwargs) if self.layout.overwrites else None

    def _text(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        text = self.layout.txt
        if text is None or streams.txt is None:
            return None
        return text.as_given(streams.txt, text.entering(args, kwargs))

    def _split(self, tokens: Tensor, txt: Tensor | None) -> TokenStreams:
        if not self.layout.joined:
            return TokenStreams(tokens, txt)
        num_img = self._num_img()
        if self.layout.joined == "image first":
            return TokenStreams(tokens[:, :num_img], tokens[:, num_img:])
        num_txt = tokens.shape[1] - num_img
        return TokenStreams(tokens[:, num_txt:], tokens[:, :num_txt])

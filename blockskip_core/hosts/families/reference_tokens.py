"""Tokens of reference pictures in a block's call, for families that append them to the picture's own.

The loss covers the picture's tokens only, and no head reads the others. In all that, reference pictures are like text:
a front span's output holds their tokens too, a back span's residual only if kept blocks follow. So they are counted as
text, and everything above this file knows two kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...model import BlockIO, TokenStreams
from .base import REFERENCE_TOKENS


class WithReferences:
    """A :class:`~....model.BlockIO` that counts a call's last image tokens as text if they are of reference pictures.

    Args:
        io: How the blocks take and return tokens; those of reference pictures are the last of its image tokens.
    """

    def __init__(self, io: BlockIO) -> None:
        self._io = io

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return _apart(self._io.entering(args, kwargs), kwargs)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return _apart(self._io.leaving(result, args, kwargs), kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return self._io.result(_together(streams, kwargs), args, kwargs)


def _apart(streams: TokenStreams, kwargs: Mapping[str, Any]) -> TokenStreams:
    number = _number(kwargs)
    if not number or streams.txt is None:
        return streams
    img, references = streams.img[:, :-number], streams.img[:, -number:]
    return TokenStreams(img, torch.cat((streams.txt, references), dim=1))


def _together(streams: TokenStreams, kwargs: Mapping[str, Any]) -> TokenStreams:
    """Undo :func:`_apart`."""
    number = _number(kwargs)
    if not number or streams.txt is None:
        return streams
    txt, references = streams.txt[:, :-number], streams.txt[:, -number:]
    return TokenStreams(torch.cat((streams.img, references), dim=1), txt)


def _number(kwargs: Mapping[str, Any]) -> int:
    return kwargs["transformer_options"].get(REFERENCE_TOKENS, 0)

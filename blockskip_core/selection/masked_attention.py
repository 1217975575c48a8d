"""Attention in which image tokens cannot see the text (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.2, Alg. 1).

In joint attention the scores of image queries against text keys are set to minus infinity; text queries still see
everything. A softmax with those columns at minus infinity equals a softmax over the image keys alone, so there is no
need for a mask of size (L + N) squared: the attention function is called twice and the results are joined.

Axis legend: ``B`` batch, ``h`` heads, ``L`` text tokens, ``N`` image tokens, ``d`` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInputError

AttentionFunction = Callable[..., Tensor]


def attend_without_text(
    attention: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *args: Any,
    num_text_tokens: int,
    text_last: bool = False,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Call ``attention`` so that image queries see image keys only. The text tokens come first, or last.

    Args:
        attention: The host's attention function; called as ``attention(q, k, v, *args, mask=..., ...)``.
        q, k, v: Shape (B, h, L + N, d) with ``skip_reshape``, else (B, L + N, h * d); q may be the N image queries only.
        args: Positional arguments after ``v`` (the number of heads, and in some models the mask).
        num_text_tokens: L.
        text_last: Whether the text tokens come after those of the image.
        mask: An existing mask, additive or boolean, last two axes (queries or 1, keys), or None.

    Returns:
        What ``attention`` returns, with the queries' axis joined again.

    Raises:
        InvalidInputError: If there are no image tokens, or the queries are neither all tokens nor those of the image.
    """
    axis = 2 if skip_reshape else 1
    total = k.shape[axis]
    if not 0 <= num_text_tokens < total:
        raise InvalidInputError(f"Expected fewer than {total} text tokens, got {num_text_tokens}.")
    num_image_tokens = total - num_text_tokens
    if q.shape[axis] not in (total, num_image_tokens):
        raise InvalidInputError(f"Expected {total} or {num_image_tokens} queries, got {q.shape[axis]}.")
    others = q.shape[axis] - num_image_tokens
    if len(args) > 1:  # some models pass the mask by position
        mask, args = args[1], (args[0], *args[2:])
    shared = dict(kwargs, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)

    image = slice(0, num_image_tokens) if text_last else slice(num_text_tokens, total)
    asking = image if others else slice(0, num_image_tokens)
    text = slice(num_image_tokens, total) if text_last else slice(0, num_text_tokens)

    def of(x: Tensor, tokens: slice) -> Tensor:
        return x.narrow(axis, tokens.start, tokens.stop - tokens.start)

    seen = attention(
        of(q, asking), of(k, image), of(v, image), *args, mask=_part_of_mask(mask, asking, image), **shared
    )  # fmt: skip
    if not others:
        return seen
    told = attention(of(q, text), k, v, *args, mask=_part_of_mask(mask, text, slice(0, total)), **shared)
    return torch.cat((seen, told) if text_last else (told, seen), dim=2 if skip_output_reshape else 1)


def _part_of_mask(mask: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """Return some rows and columns of a mask; a broadcast query axis is kept."""
    if mask is None:
        return None
    rows = mask if mask.shape[-2] == 1 else mask[..., queries, :]
    return rows[..., keys]

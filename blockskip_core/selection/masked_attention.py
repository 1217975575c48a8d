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
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Call ``attention`` so that image queries see image keys only. The text tokens come first.

    Args:
        attention: The host's attention function; called as ``attention(q, k, v, *args, mask=..., ...)``.
        q, k, v: Shape (B, h, L + N, d) with ``skip_reshape``, else (B, L + N, h * d).
        args: Positional arguments after ``v`` (the number of heads, and in some models the mask).
        num_text_tokens: L.
        mask: An existing mask, additive or boolean, last two axes (queries or 1, keys), or None.

    Returns:
        What ``attention`` returns, with the queries' axis joined again.

    Raises:
        InvalidInputError: If there are no image tokens.
    """
    axis = 2 if skip_reshape else 1
    total = q.shape[axis]
    if not 0 <= num_text_tokens < total:
        raise InvalidInputError(f"Expected fewer than {total} text tokens, got {num_text_tokens}.")
    if len(args) > 1:  # some models pass the mask by position
        mask, args = args[1], (args[0], *args[2:])
    shared = dict(kwargs, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)

    def tokens(x: Tensor, start: int, stop: int) -> Tensor:
        return x.narrow(axis, start, stop - start)

    image = attention(
        tokens(q, num_text_tokens, total),
        tokens(k, num_text_tokens, total),
        tokens(v, num_text_tokens, total),
        *args,
        mask=_part_of_mask(mask, num_text_tokens, total, keys_from=num_text_tokens),
        **shared,
    )
    if num_text_tokens == 0:
        return image
    text = attention(
        tokens(q, 0, num_text_tokens), k, v, *args, mask=_part_of_mask(mask, 0, num_text_tokens, keys_from=0), **shared
    )
    return torch.cat((text, image), dim=2 if skip_output_reshape else 1)


def _part_of_mask(mask: Tensor | None, start: int, stop: int, *, keys_from: int) -> Tensor | None:
    """Return rows [start, stop) and columns from ``keys_from`` of a mask; a broadcast query axis is kept."""
    if mask is None:
        return None
    rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
    return rows[..., keys_from:]

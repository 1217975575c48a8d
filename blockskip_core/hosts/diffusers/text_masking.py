"""Blocks in which image tokens cannot see the text (DiT-BlockSkip, arXiv 2603.20755, Sec. 3.2, Alg. 1).

Where text is in the stream, the block's joint attention is called twice, see ``selection.masked_attention``. The paper does not
say what masking means for cross attention, where a softmax with all keys masked is undefined: here its result is zero
before the layer that it enters, so text adds nothing but that layer's bias.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...blocks.token_places import Joined
from ...blocks.weight_sharing import weight_sharing_copy
from ...errors import UnsupportedModelError
from ...model import BlockInfo
from ...selection.masked_attention import attend_without_text
from .diffusers_dit import DiffusersDit


def masked_blocks(dit: DiffusersDit, masked: Collection[int]) -> dict[str, nn.Module]:
    """Return stand-ins for some blocks in which image tokens cannot see the text, for ``dit.running``.

    Args:
        dit: The model.
        masked: Indices of the blocks.
    """
    return {dit.blocks[index].name: _without_text(dit, dit.blocks[index]) for index in sorted(masked)}


def _without_text(dit: DiffusersDit, block: BlockInfo) -> nn.Module:
    twin = weight_sharing_copy(dit.module(block.name))
    if dit.layout.cross_attention:
        after = twin.get_submodule(dit.layout.cross_attention)
        after.register_forward_pre_hook(lambda layer, args: (torch.zeros_like(args[0]), *args[1:]))
        return twin
    return _JointWithoutText(twin, block, dit.layout.layout_of(block.name).joined)


class _JointWithoutText(nn.Module):
    """A block with joint attention, run so that image tokens cannot see the text."""

    def __init__(self, block: nn.Module, info: BlockInfo, joined: Joined) -> None:
        super().__init__()
        self.block, self._info, self._joined = block, info, joined

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        text = self._info.io.entering(args, kwargs).txt
        assert text is not None  # families without text in the stream have cross attention
        with _HiddenText(text.shape[1], text_last=self._joined == "image first") as attention:
            result = self.block(*args, **kwargs)
        if not attention.seen:
            raise UnsupportedModelError(
                "The text cannot be hidden from this model's blocks, because their attention is not torch's "
                "scaled_dot_product_attention. Call transformer.set_attention_backend('native') first."
            )
        return result


class _HiddenText(TorchFunctionMode):
    """Context in which torch's attention is called so that image tokens cannot see the text.

    Args:
        num_text: Number of text tokens, which diffusers puts first in every joint attention except Z-Image's.
        text_last: Whether they come last.

    Attributes:
        seen: Whether attention was called.
    """

    def __init__(self, num_text: int, *, text_last: bool) -> None:
        super().__init__()
        self._num_text, self._text_last = num_text, text_last
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the attention of queries, keys and values of shape (B, heads, tokens, width of a head)."""
        shift = self._num_text if self._text_last else 0  # to the front, and back
        query, key, value = (x.roll(shift, 2) for x in (query, key, value))
        mask = None if attn_mask is None else _rolled_mask(attn_mask, shift)
        attended = attend_without_text(
            partial(_attention, **kwargs), query, key, value,
            num_text_tokens=self._num_text, mask=mask, skip_reshape=True, skip_output_reshape=True,
        )  # fmt: skip
        return attended.roll(-shift, 2)


def _rolled_mask(mask: Tensor, shift: int) -> Tensor:
    rolled = mask.roll(shift, -1)
    return rolled if mask.shape[-2] == 1 else rolled.roll(shift, -2)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    skip_reshape: bool,
    skip_output_reshape: bool,
    **kwargs: Any,
) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)

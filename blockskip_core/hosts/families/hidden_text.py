"""Hide the text from the image tokens of some blocks of a model that was followed, for Select Blocks.

Where the text is among the keys of a block's attention calls was found by following it. The wrapper counts the calls of each
block by hooks that exist only during the model's call, because attention does not know which block it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...selection.masked_attention import attend_without_text
from .text_masking import OVERRIDE, Attention, after

TextKeys = Literal["none", "first", "last", "all"]
"""Where the text is among the keys of an attention call that the image's queries see."""


def hide_text(
    model: nn.Module, hidden: Mapping[str, Sequence[TextKeys]], num_image: Callable[[Tensor, Sequence[Tensor]], int]
) -> Callable[..., Any]:
    """Return an APPLY_MODEL wrapper under which image tokens of some blocks cannot see the text.

    Args:
        model: The diffusion model.
        hidden: Path of a block -> where the text is among the keys of its attention calls, in order.
        num_image: (latents of a call, latents of its references) -> the number of their tokens.
    """

    def wrapper(
        executor: Callable[..., Any],
        x: Any,
        t: Any,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        calls = _CallsOfBlocks(hidden, num_image(x, kwargs.get("ref_latents") or ()))
        options = dict(transformer_options or {})
        options[OVERRIDE] = after(options.get(OVERRIDE), calls.attend)
        with calls.counted(model):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return wrapper


class _CallsOfBlocks:
    """The attention calls of one call of the model.

    Args:
        hidden: See :func:`hide_text`.
        num_image: Number of tokens of the picture and its references.
    """

    def __init__(self, hidden: Mapping[str, Sequence[TextKeys]], num_image: int) -> None:
        self._hidden, self._num_image = hidden, num_image
        self._block = ""  # that runs, if it is one of the hidden ones
        self._due: list[TextKeys] = []

    @contextmanager
    def counted(self, model: nn.Module) -> Iterator[None]:
        """Count the calls of each block while the model runs.

        Raises:
            UnsupportedModelError: If a block makes another number of calls than the one that was followed.
        """
        handles = []
        try:
            for name in self._hidden:
                block = model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(partial(self._enter, name)))
                handles.append(block.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, block: nn.Module, args: Any) -> None:
        self._block, self._due = name, list(self._hidden[name])

    def _leave(self, block: nn.Module, args: Any, result: Any) -> None:
        if self._due:
            self._refuse()
        self._block = ""

    def _refuse(self) -> None:
        raise UnsupportedModelError(
            f"The block {self._block} calls attention another number of times than when the model was followed, so the text "
            "cannot be hidden from it. Choose method preset or manual."
        )

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend as ``attention`` does, without the text if the block is one of the hidden ones."""
        if not self._block:
            return attention(q, k, v, *args, **kwargs)
        if not self._due:
            self._refuse()
        keys = self._due.pop(0)
        if keys == "none":
            return attention(q, k, v, *args, **kwargs)
        if keys == "all":
            return torch.zeros_like(
                attention(q, k, v, *args, **kwargs)
            )  # as for Wan; a softmax over no keys is undefined
        num_text = k.shape[2 if kwargs.get("skip_reshape") else 1] - self._num_image
        return attend_without_text(
            attention, q, k, v, *args, num_text_tokens=num_text, text_last=keys == "last", **kwargs
        )  # fmt: skip

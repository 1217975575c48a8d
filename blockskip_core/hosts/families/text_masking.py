"""Hide the text from the image tokens of some blocks while the host samples, for Select Blocks.

Everything happens in the ``transformer_options`` of one model call: attention overrides and block replacements set by
other nodes remain in force, and the model itself is not touched. The wrapper is put around ``apply_model``, because
every family goes through it and the text's length is known there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...selection.masked_attention import attend_without_text

Attention = Callable[..., Tensor]
Override = Callable[..., Tensor]  # (attention, q, k, v, *args, **kwargs) -> Tensor
OVERRIDE = "optimized_attention_override"  # in transformer_options: called in the place of the host's attention


def wrap_options(change: Callable[[dict[str, Any], int], None]) -> Callable[..., Any]:
    """Return an APPLY_MODEL wrapper that calls ``change(transformer_options, text length)`` on a copy of the options."""

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
        options = dict(transformer_options or {})
        change(options, c_crossattn.shape[1])
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return wrapper


def mask_by_index(options: dict[str, Any], masked: Callable[[dict[str, Any]], bool], num_text_tokens: int) -> None:
    """Mask joint attention wherever ``masked(transformer_options of the call)`` says so."""

    def override(attention: Attention, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not masked(kwargs["transformer_options"]):
            return attention(q, k, v, *args, **kwargs)
        return attend_without_text(attention, q, k, v, *args, num_text_tokens=num_text_tokens, **kwargs)

    options[OVERRIDE] = after(options.get(OVERRIDE), override)


def mask_by_block(
    options: dict[str, Any], blocks: frozenset[int], override_for: Callable[[dict[str, Any]], Override]
) -> None:
    """Give each of the ``blocks`` its own attention override, created for every call of the block.

    For families whose attention does not know which block it is in. Uses the host's block replacement hook.

    Args:
        options: transformer_options; modified.
        blocks: Block indices.
        override_for: Arguments of the block as the hook receives them ("img", "txt", ...) -> override.
    """
    replacements = dict(options.get("patches_replace", {}))
    hooks = dict(replacements.get("dit", {}))
    for index in blocks:
        hooks["double_block", index] = partial(_run_masked, hooks.get(("double_block", index)), override_for)
    options["patches_replace"] = {**replacements, "dit": hooks}


def _run_masked(
    previous: Callable[..., Any] | None,
    override_for: Callable[[dict[str, Any]], Override],
    args: dict[str, Any],
    extra: dict[str, Any],
) -> dict[str, Any]:
    options = dict(args["transformer_options"])
    options[OVERRIDE] = after(options.get(OVERRIDE), override_for(args))
    args = {**args, "transformer_options": options}
    return extra["original_block"](args) if previous is None else previous(args, extra)


def after(previous: Override | None, override: Override) -> Override:
    """Return ``override``, with another node's override as the attention that it calls."""
    if previous is None:
        return override
    return lambda attention, *args, **kwargs: override(partial(previous, attention), *args, **kwargs)


def without_cross_attention(attention: Attention, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return zeros: text that is not seen adds nothing, and a softmax with all keys masked is undefined."""
    return torch.zeros_like(q)

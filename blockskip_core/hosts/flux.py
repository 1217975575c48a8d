"""FLUX.1 (dev and schnell): double-stream blocks, then single-stream blocks over text and image tokens, text first.

Layout of ``comfy.ldm.flux.model.Flux`` as of ComfyUI 0.18 to 0.30. FLUX.2 uses the same class with modulation shared
by all blocks; it is not served here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.ldm.flux.model
import torch
from torch import nn

from ..lora import LoraTargets
from ..masked_attention import attend_without_text
from ..streams import BlockInfo, TokenStreams
from .base import block_info

_ATTENTION = ("attn.qkv", "attn.proj", "linear1", "linear2")  # single blocks fuse attention and MLP in two layers
_MLP = ("mlp.0", "mlp.2", "linear1", "linear2")


class DoubleBlockIO:
    """``block(img=, txt=, vec=, pe=, ...) -> (img, txt)``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(kwargs["img"], kwargs["txt"])

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return TokenStreams(*result)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return streams.img, streams.txt


class SingleBlockIO:
    """``block(tokens, vec=, pe=, ...) -> tokens``, text first; the host says how many in ``img_slice``."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._split(args[0], kwargs)

    def leaving(self, result: Any, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        return self._split(result, kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return torch.cat((streams.txt, streams.img), dim=1)

    @staticmethod
    def _split(tokens: torch.Tensor, kwargs: Mapping[str, Any]) -> TokenStreams:
        num_text = kwargs["transformer_options"]["img_slice"][0]
        return TokenStreams(tokens[:, num_text:], tokens[:, :num_text])


class FluxAdapter:
    """FLUX.1."""

    family = "flux"
    title = "FLUX.1"
    frozen_stem = ("img_in", "time_in", "guidance_in", "vector_in", "txt_in")
    trainable_head = ("final_layer",)

    def __init__(self, diffusion_model: nn.Module) -> None:
        self._model = diffusion_model

    @classmethod
    def matches(cls, diffusion_model: nn.Module) -> bool:
        is_flux = type(diffusion_model) is comfy.ldm.flux.model.Flux
        return is_flux and not getattr(diffusion_model.params, "global_modulation", False)

    def blocks(self) -> Sequence[BlockInfo]:
        return [
            *block_info(self._model, "double_blocks", DoubleBlockIO()),
            *block_info(self._model, "single_blocks", SingleBlockIO()),
        ]

    @property
    def patch_size(self) -> int:
        return self._model.patch_size

    @property
    def width(self) -> int:
        return self._model.hidden_size

    def is_lora_target(self, name: str, targets: LoraTargets) -> bool:
        suffixes = {"attention and mlp": _ATTENTION + _MLP, "attention": _ATTENTION, "mlp": _MLP}.get(targets)
        return suffixes is None or name.endswith(suffixes)

    def text_masking_wrapper(self, blocks: frozenset[int]) -> Callable[..., Any]:
        """Return a wrapper of ``Flux.forward(x, timestep, context, y, guidance, ref_latents, control, to, ...)``.

        The text length is known only here, from ``context``: in double-stream blocks the host does not tell it to the
        attention function.
        """
        num_double = len(self._model.double_blocks)

        def wrapper(
            executor: Callable[..., Any], x: Any, timestep: Any, context: Any, *rest: Any, **kwargs: Any
        ) -> Any:
            rest = list(rest)
            options = dict(kwargs["transformer_options"] if "transformer_options" in kwargs else rest[4])
            options["optimized_attention_override"] = partial(
                _masked_in_blocks,
                blocks=blocks,
                num_double=num_double,
                num_text_tokens=context.shape[1],
                previous=options.get("optimized_attention_override"),
            )
            if "transformer_options" in kwargs:
                kwargs["transformer_options"] = options
            else:
                rest[4] = options
            return executor(x, timestep, context, *rest, **kwargs)

        return wrapper


def _masked_in_blocks(
    attention: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    blocks: frozenset[int],
    num_double: int,
    num_text_tokens: int,
    previous: Callable[..., torch.Tensor] | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention override: masked in some blocks, as it was in the others; another node's override stays in force."""
    if previous is not None:
        attention = partial(previous, attention)
    options = kwargs["transformer_options"]
    offset = {"double": 0, "single": num_double}[options["block_type"]]
    if options["block_index"] + offset not in blocks:
        return attention(q, k, v, *args, **kwargs)
    return attend_without_text(attention, q, k, v, *args, num_text_tokens=num_text_tokens, **kwargs)

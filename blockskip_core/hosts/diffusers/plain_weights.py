"""Refusal of models whose weights or calls another program has changed in a way that training cannot follow."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import UnsupportedModelError
from ...model import is_linear


def require_plain(transformer: Any) -> None:
    """Check that a transformer's layers have plain weights and that nothing is wrapped around its calls.

    Raises:
        UnsupportedModelError: If its weights are quantised or fused, a LoRA is loaded into it, or it is offloaded or cached by
            hooks.
    """
    if getattr(transformer, "peft_config", None):
        raise UnsupportedModelError(
            "A LoRA is loaded into this transformer. Call pipeline.unload_lora_weights() first, or fuse it and then unload."
        )
    for name, module in transformer.named_modules():
        if _is_hooked(module):
            raise UnsupportedModelError(
                f"{name or 'The transformer'} has a hook of accelerate or diffusers (offloading, or a cache of steps), which "
                "training cannot follow. Load the pipeline without it: skipped blocks are not moved to the device anyway."
            )
        if getattr(module, "fused_projections", False):
            raise UnsupportedModelError(
                f"The projections of {name} are fused, so files have no names for its layers. Call "
                "transformer.unfuse_qkv_projections() first."
            )
        if is_linear(module) and not _has_plain_weight(module):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedModelError(
                f"The weight of {name} ({kind}) is quantised, so no gradient can pass. Load the model in bf16, fp16 or fp32."
            )


def _is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate (offloading) or diffusers (group offloading, caches) has wrapped a module's calls.

    A pipeline that has made a picture leaves a registry of diffusers on its transformer, without hooks.
    """
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or bool(getattr(registry, "hooks", None))


def _has_plain_weight(layer: nn.Linear) -> bool:
    """Return whether a layer's weight is an ordinary matrix in a dtype that it can be multiplied in."""
    weight = getattr(layer, "weight", None)
    return (
        type(weight) is nn.Parameter
        and weight.is_floating_point()
        and weight.element_size() > 1
        and tuple(weight.shape) == (layer.out_features, layer.in_features)
    )

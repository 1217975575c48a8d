"""ComfyUI on the emulated card, with the model management that it uses on real cards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import pages
from .card import Card


def disable_kernels() -> None:
    """Make ComfyUI compute with torch's own operations, because its own CUDA kernels need a driver."""
    import comfy_kitchen

    for backend in ("cuda", "triton", "hip"):
        if backend in comfy_kitchen.registry.list_backends():
            comfy_kitchen.registry.disable(backend)


@contextmanager
def dynamic_vram(card: Card, limit: int | None = None, page: int = pages.PAGE) -> Iterator[pages.Pager]:
    """Make ComfyUI page weights in and out, as it does by default on NVIDIA cards.

    Build models before this: in this mode ComfyUI leaves weights empty until a file fills them. See :func:`as_dynamic`.

    Args:
        card: The card.
        limit: The maximum number of pages per model; None for as many as fit.
        page: Bytes of a page.
    """
    import comfy.memory_management
    import comfy.model_patcher

    ordinary = comfy.model_patcher.CoreModelPatcher
    with pages.installed(card, page) as pager:
        pager.limit = limit
        try:
            comfy.memory_management.aimdo_enabled = True
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            yield pager
        finally:
            forget_models()
            comfy.memory_management.aimdo_enabled = False
            comfy.model_patcher.CoreModelPatcher = ordinary


def as_dynamic(patcher: Any) -> Any:
    """Return a MODEL with the same weights, paged."""
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcherDynamic(patcher.model, patcher.load_device, patcher.offload_device)


def is_lent(address: int) -> bool:
    """Return whether an address is in memory that ComfyUI uses for one layer's forward pass and then overwrites."""
    import comfy.model_management

    buffers = comfy.model_management.STREAM_CAST_BUFFERS.values()
    in_buffer = any(0 <= address - buffer.data_ptr() < buffer.nbytes for buffer in buffers)
    pager = getattr(pages.ModelVBAR, "pager", None)
    return in_buffer or (pager is not None and pager.owns(address))


def forget_models() -> None:
    """Unload every model and drop the buffers that ComfyUI keeps for the next one, in inference mode as in a prompt."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.unload_all_models()
        comfy.model_management.reset_cast_buffers()
    gc.collect()

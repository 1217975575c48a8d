"""The host's kernels that have no backward, and what runs in their place while a model is trained.

comfy_kitchen registers its rotations of queries and keys as operations of their own and, up to version 0.2, gives them no
gradient. For each there is a function of the same name in plain torch, which is also what runs where no faster kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...blocks.out_of_place import replace_kernels

ROTATIONS = (
    "apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1",
    "rms_rope", "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1",
)  # fmt: skip


def kernels_with_backward() -> dict[Any, Callable[..., Any]]:
    """Return the plain function for every rotation that this version of comfy_kitchen has."""
    try:
        from comfy_kitchen.backends.eager import rope
    except ImportError:  # older hosts rotate in plain torch
        return {}
    namespace = torch.ops.comfy_kitchen
    return {
        getattr(namespace, name): getattr(rope, name)
        for name in ROTATIONS
        if hasattr(rope, name) and hasattr(namespace, name)
    }


replace_kernels(kernels_with_backward())

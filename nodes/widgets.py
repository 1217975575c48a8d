"""Inputs shared by several nodes, declared once with the same id, type, default and limits.

Each function takes the tooltip and anything else that differs between nodes (``optional``, ``advanced``).
"""

from __future__ import annotations

from typing import Any, get_args

import folder_paths
from comfy_api.latest import io

from ..blockskip_core.adapters.lora import LoraTargets
from ..blockskip_core.data.reference_pictures import REFERENCE_PARTS
from ..blockskip_core.hosts.models.quantised_blocks import available_formats, default_for_frozen_blocks
from ..blockskip_core.residuals.back_response import BACK_RESIDUALS
from ..blockskip_core.residuals.format import RESIDUAL_FORMATS
from ..blockskip_core.residuals.residual_set import STORAGES
from ..blockskip_core.training.optimizers import OPTIMIZERS
from .inputs import NO_FILE
from .types import MemorySettingsSocket

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
LARGEST_SIDE = 4096  # pixels
MOST_STEPS = 1_000_000


def seed(tooltip: str, *, control: Any = io.ControlAfterGenerate.fixed, **more: Any) -> io.Int.Input:
    """The seed of random numbers; ``control`` is what the page does with it after each run."""
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=control, tooltip=tooltip, **more
    )


def side(name: str, default: int, tooltip: str, *, least: int = 16, **more: Any) -> io.Int.Input:
    """The side of a picture in pixels."""
    return io.Int.Input(name, default=default, min=least, max=LARGEST_SIDE, step=16, tooltip=tooltip, **more)


def patch_min(tooltip: str) -> io.Int.Input:
    """The side of every training picture."""
    return side("patch_min", 256, tooltip)


def probe_size(tooltip: str) -> io.Int.Input:
    """The side of the pictures that block selection samples."""
    return side("probe_size", 512, tooltip, least=64, optional=True, advanced=True)


def draws(tooltip: str) -> io.Int.Input:
    """The number of training examples."""
    return io.Int.Input("draws", default=400, min=1, max=1_000_000, tooltip=tooltip)


def frames(tooltip: str) -> io.Int.Input:
    """The number of pictures of a clip."""
    return io.Int.Input("frames", default=1, min=1, max=1001, optional=True, advanced=True, tooltip=tooltip)


def noise_from(tooltip: str) -> io.Float.Input:
    """The lowest noise level."""
    return _noise_level("noise_from", 0.0, tooltip)


def noise_to(tooltip: str) -> io.Float.Input:
    """The highest noise level."""
    return _noise_level("noise_to", 1.0, tooltip)


def _noise_level(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.001, optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def storage(tooltip: str) -> io.Combo.Input:
    """Where residuals are kept."""
    return io.Combo.Input("storage", options=list(STORAGES), default="disk", tooltip=tooltip)


def chunk_size(tooltip: str) -> io.Int.Input:
    """The number of training examples that go through the blocks together."""
    return io.Int.Input(
        "chunk_size", default=64, min=1, max=100_000, optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def back_residual(tooltip: str) -> io.Combo.Input:
    """What replaces the last blocks.

    The default is what keeps the most likeness; the paper's is "constant".
    """
    return io.Combo.Input(
        "back_residual", options=list(BACK_RESIDUALS), default="exact", optional=True, advanced=True, tooltip=tooltip
    )


def residual_format(tooltip: str) -> io.Combo.Input:
    """How residuals are rounded."""
    return io.Combo.Input(
        "residual_format", options=list(RESIDUAL_FORMATS), default="exact", optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def rank(tooltip: str) -> io.Int.Input:
    """The LoRA's rank."""
    return io.Int.Input("rank", default=16, min=1, max=1024, tooltip=tooltip)


def targets(tooltip: str) -> io.Combo.Input:
    """Which layers are trained."""
    return io.Combo.Input(
        "targets", options=list(get_args(LoraTargets)), default="attention and mlp", optional=True, advanced=True,
        tooltip=tooltip,
    )  # fmt: skip


def batch_size(tooltip: str, **more: Any) -> io.Int.Input:
    """The number of training examples that go through the model together."""
    return io.Int.Input("batch_size", default=1, min=1, max=256, tooltip=tooltip, **more)


def checkpointing(tooltip: str, **more: Any) -> io.Boolean.Input:
    """Whether activations are recomputed."""
    return io.Boolean.Input("checkpointing", default=True, tooltip=tooltip, **more)


def activation_budget(tooltip: str, **more: Any) -> io.Float.Input:
    """GiB of activations to keep despite checkpointing."""
    return io.Float.Input("activation_budget", default=0.0, min=0.0, max=1024.0, step=0.25, tooltip=tooltip, **more)


def quantize_kept(tooltip: str, **more: Any) -> io.Combo.Input:
    """The format of the trained blocks' weights."""
    return io.Combo.Input("quantize_kept", options=available_formats(), default="off", tooltip=tooltip, **more)


def quantize_frozen(tooltip: str) -> io.Combo.Input:
    """The format of the weights of blocks that run without adapters."""
    return io.Combo.Input(
        "quantize_frozen", options=available_formats(), default=default_for_frozen_blocks(), optional=True, advanced=True,
        tooltip=tooltip,
    )  # fmt: skip


def optimizer(tooltip: str) -> io.Combo.Input:
    """The optimiser."""
    return io.Combo.Input(
        "optimizer", options=list(OPTIMIZERS), default="AdamW", optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def ema(tooltip: str) -> io.Float.Input:
    """The decay of the LoRA's moving average."""
    return io.Float.Input(
        "ema", default=0.0, min=0.0, max=0.9999, step=0.001, round=0.0001, optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def lora_file(name: str, tooltip: str, **more: Any) -> io.Combo.Input:
    """A file of the loras folders, or none."""
    files = folder_paths.get_filename_list("loras")
    return io.Combo.Input(
        name, options=[NO_FILE, *files], default=NO_FILE, optional=True, tooltip=tooltip, **more
    )  # fmt: skip


def memory_settings(tooltip: str) -> io.Input:
    """The settings from Memory Plan."""
    return MemorySettingsSocket.Input("memory_settings", optional=True, tooltip=tooltip)


def reference_size(tooltip: str) -> io.Int.Input:
    """The size of reference pictures."""
    return io.Int.Input(
        "reference_size", default=512, min=16, max=LARGEST_SIDE, step=16, optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip


def reference_part(tooltip: str) -> io.Combo.Input:
    """Which part of a reference picture is shown."""
    return io.Combo.Input(
        "reference_part", options=list(REFERENCE_PARTS), default="whole", optional=True, advanced=True, tooltip=tooltip
    )  # fmt: skip

"""Writes files so that a killed process never leaves a partial one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under another name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint under another name, then rename it."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)

"""Several processes that train one model, each on pictures of its own, started by torchrun.

Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os

import torch
from torch import nn


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def ranks() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sharing_gradients(model: nn.Module) -> nn.Module:
    """Wrap a model so that every backward pass averages its gradients over all processes."""
    if ranks() == 1:
        return model
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return nn.parallel.DistributedDataParallel(model)


def seed_for(seed: int, step: int) -> int:
    """Seed of this process for a step; process 0 has that of a single process."""
    return (seed << 32) + (rank() << 24) + step

"""The optimisers that a run can take: torch's AdamW, or bitsandbytes' with 8-bit moments (arXiv 2110.02861).

AdamW keeps two float32 numbers for each number of the LoRA. In 8 bits these take a quarter: at rank 16 on FLUX.1's last
28 single blocks about 110 MiB less. bitsandbytes is an extra that users install themselves; nothing here asks for it
before a run does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from .errors import InvalidInputError

OptimizerName = Literal["AdamW", "AdamW 8-bit (bitsandbytes)"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


def build_optimizer(
    name: OptimizerName, parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimiser over ``parameters``.

    Raises:
        InvalidInputError: If the extra package that it needs is not installed.
    """
    kind = torch.optim.AdamW if name == "AdamW" else _bitsandbytes().AdamW8bit
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay)


def _bitsandbytes():
    try:
        return importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise InvalidInputError(
            "The 8-bit AdamW needs the Python package bitsandbytes, which could not be imported "
            f"({error}). Install it into ComfyUI's Python with `pip install bitsandbytes`, or choose AdamW."
        ) from error

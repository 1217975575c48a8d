"""The optimisers for a run: AdamW, with 8-bit moments too (arXiv 2110.02861), and Adafactor (arXiv 1804.04235).

AdamW is torch's and keeps two float32 numbers for each parameter of the LoRA. In 8 bits, by bitsandbytes, these take a
quarter of the memory: at rank 16 on FLUX.1's last 28 single blocks about 110 MiB less. Adafactor keeps one number for
each row and column instead, and no first moment. It is transformers', with absolute steps (the paper's Algorithm 4 with
a step size from outside): relative steps scale with the parameter's own size, and a LoRA's B starts at zero. torch's
has relative steps only. bitsandbytes is an extra that users install themselves; both packages are only imported when a
run asks for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError

OptimizerName = Literal["AdamW", "AdamW 8-bit (bitsandbytes)", "Adafactor"]
_WITH_FUSED_ADAMW = ("cpu", "cuda")
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)


def build_optimizer(
    name: OptimizerName, parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return an optimiser over ``parameters``.

    For AdamW, torch's fused form is used on devices known to have it: on a GPU the other forms hold copies of all
    moments during a step (on FLUX.1 at rank 16 about 200 MiB).

    Raises:
        InvalidInputError: If the required extra package is not installed.
    """
    if name == "AdamW 8-bit (bitsandbytes)":
        eight_bit = _extra("bitsandbytes.optim", "The 8-bit AdamW")
        return eight_bit.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "Adafactor":
        return _extra("transformers.optimization", name).Adafactor(
            parameters, lr=learning_rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False
        )
    fused = all(parameter.device.type in _WITH_FUSED_ADAMW for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's moments and counters by path: first the tensors, on the CPU, then everything else."""
    values = dict(_leaves(optimizer.state_dict()["state"], ""))
    tensors = {path: value.detach().to("cpu", copy=True) for path, value in values.items() if isinstance(value, Tensor)}
    return tensors, {path: value for path, value in values.items() if path not in tensors}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Load the state returned by :func:`optimizer_state` into an optimiser over the same parameters."""
    state: dict[int, Any] = {}
    for path, value in {**tensors, **numbers}.items():
        index, *names, last = path.split("/")
        place = state.setdefault(int(index), {})
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value.clone() if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _leaves(content: Mapping[Any, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


def _extra(module: str, what: str) -> Any:
    """Return a module of another package."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidInputError(
            f"{what} needs the Python package {package}, which could not be imported ({error}). Install it into "
            f"ComfyUI's Python with `pip install {package}`, or choose AdamW."
        ) from error

"""The optimisers for a run: AdamW, with 8-bit moments too (arXiv 2110.02861), Adafactor and Prodigy.

AdamW is torch's and keeps two float32 numbers for each parameter of the LoRA. In 8 bits, by bitsandbytes, these take
a quarter of the memory: at rank 16 on FLUX.1's last 28 single blocks about 110 MiB less. Adafactor (arXiv 1804.04235)
keeps one number for each row and column instead, and no first moment. It is transformers', with absolute steps (the
paper's Algorithm 4 with a step size from outside): relative steps scale with the parameter's own size, and a LoRA's B
starts at zero. torch's has relative steps only.

Prodigy (arXiv 2306.06101) estimates its step size, the ``d`` of its Algorithm 4, from how far the LoRA has moved
against its gradients; the learning rate multiplies it, so 1 is its usual value. It is its authors' package, with what
they recommend for diffusion models: the bias correction of Adam, and an estimate that a warm-up of the rate does not
inflate. It keeps two numbers for each parameter more than AdamW: its start and a sum of gradients. All parameters
share ``d``, so it is in the group's numbers, and these belong to the state as well.

bitsandbytes and prodigyopt are extras that users install themselves; all packages are only imported when a run asks
for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError

OptimizerName = Literal["AdamW", "AdamW 8-bit (bitsandbytes)", "Adafactor", "Prodigy (prodigyopt)"]
PRODIGY: OptimizerName = "Prodigy (prodigyopt)"
_PACKAGES = {"AdamW 8-bit (bitsandbytes)": "bitsandbytes", "Adafactor": "transformers", PRODIGY: "prodigyopt"}
_WITH_FUSED_ADAMW = ("cpu", "cuda")
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
_GROUP = "group"  # in a state, in the place of a parameter's number: what the parameters share
_SHARED = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")  # of Prodigy's group, changed by every step


def require_optimizer(name: str) -> None:
    """Raise InvalidInputError if an optimiser is not known or its package is not installed; nothing is imported."""
    if name not in OPTIMIZERS:
        raise InvalidInputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise InvalidInputError(
            f"`optimizer` is {name}, but the Python package {package} is not installed. Install it into ComfyUI's "
            f"Python with `pip install {package}`, or choose AdamW."
        )


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
    if name == PRODIGY:
        return _prodigy(parameters, learning_rate, weight_decay)
    fused = all(parameter.device.type in _WITH_FUSED_ADAMW for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def _prodigy(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    extra = _extra("prodigyopt", "Prodigy")
    prodigy = extra.Prodigy(parameters, lr=learning_rate, use_bias_correction=True, safeguard_warmup=True)
    for group in prodigy.param_groups:
        group["weight_decay"] = weight_decay  # as an argument it makes the package print a line
    return prodigy


def step_size(optimizer: torch.optim.Optimizer) -> float:
    """Return the size of the next step: the learning rate, for Prodigy times its own estimate."""
    group = optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's moments and counters by path: first the tensors, on the CPU, then everything else."""
    content = optimizer.state_dict()
    values = dict(_leaves({**content["state"], _GROUP: _shared(content["param_groups"])}, ""))
    tensors = {path: value.detach().to("cpu", copy=True) for path, value in values.items() if isinstance(value, Tensor)}
    return tensors, {path: value for path, value in values.items() if path not in tensors}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Load the state returned by :func:`optimizer_state` into an optimiser over the same parameters."""
    state: dict[str, Any] = {}
    for path, value in {**tensors, **numbers}.items():
        *names, last = path.split("/")
        place = state
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value.clone() if isinstance(value, Tensor) else value
    shared = state.pop(_GROUP, {})
    groups = [{**group, **shared} for group in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": {int(index): of for index, of in state.items()}, "param_groups": groups})


def _shared(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the only group that steps change; an optimiser other than Prodigy has none."""
    (group,) = groups
    return {name: group[name] for name in _SHARED if name in group}


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

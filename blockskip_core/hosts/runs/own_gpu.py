"""A GPU of its own for each process of a machine. ComfyUI uses torch's current device: the first one everywhere."""

from __future__ import annotations

import torch

from ...errors import InvalidInputError


def take_own_gpu(local_rank: int, size: int, named: str | int | None = None) -> None:
    """Make a process's GPU torch's current device; must be called before ComfyUI's memory management is imported.

    Several processes take the GPUs in turn. A single one keeps the current device, unless one is named.

    Args:
        local_rank: Number of the process on this machine, from 0.
        size: Number of processes of the run.
        named: ComfyUI's own ``--cuda-device``: the GPUs to use, such as ``1`` or ``"0,2"``; None for all. ComfyUI's
            ``main`` would hide the others through an environment variable, too late here.

    Raises:
        InvalidInputError: If a GPU is named that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if named is None and (size == 1 or not count):
        return
    devices = list(range(count)) if named is None else [_number(each, count) for each in str(named).split(",")]
    torch.cuda.set_device(devices[local_rank % len(devices)])


def _number(name: str, count: int) -> int:
    try:
        number = int(name)
    except ValueError:
        number = -1
    if not 0 <= number < count:
        raise InvalidInputError(
            f"--cuda-device must name GPUs by number, such as 0 or 0,1, and torch sees {count} here; got {name!r}."
        )
    return number

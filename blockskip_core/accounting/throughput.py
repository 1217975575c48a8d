"""How fast this device is at the main work of training: a timed matrix product.

Operations are counted exactly before a run (see ``measuring``); dividing them by this speed gives a lower bound for the
time of a step. A real step takes longer because of everything that is not a large product: attention, norms, moving
weights, launching kernels.
"""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

_SECONDS = 0.2
_MOST_ROWS = 2048  # enough to keep the device busy, and little memory
_MOST_ROWS_ON_CPU = 256


def operations_per_second(device: torch.device, dtype: torch.dtype, width: int, tokens: int) -> float:
    """Return the operations per second of a linear layer's product, each multiplication and each addition counted.

    Args:
        device: The device to time.
        dtype: Dtype of the numbers.
        width: D; the layer is D x 4 D, as in a block's MLP.
        tokens: Rows; capped at a size that keeps the device busy.
    """
    tokens = min(tokens, _MOST_ROWS_ON_CPU if device.type == "cpu" else _MOST_ROWS)
    streams = torch.ones(tokens, width, device=device, dtype=dtype)
    weight = torch.ones(width, 4 * width, device=device, dtype=dtype)
    timer = Timer(
        "streams @ weight", globals={"streams": streams, "weight": weight}, num_threads=torch.get_num_threads()
    )
    timer.timeit(1)  # the first run takes longer
    return 2 * streams.numel() * 4 * width / timer.blocked_autorange(min_run_time=_SECONDS).median

"""How fast this device is at what training consists of: a timed product of matrices.

Operations are counted exactly before a run (see ``measuring``); divided by this they give a lower bound for a step's
time. It takes longer because of everything that is not a large product: attention, norms, moving weights, starting
kernels.
"""

from __future__ import annotations

import torch
from torch.utils.benchmark import Timer

_SECONDS = 0.2
_MOST_ROWS = 2048  # enough to be busy, and little memory
_MOST_ROWS_ON_CPU = 256


def operations_per_second(device: torch.device, dtype: torch.dtype, width: int, tokens: int) -> float:
    """Return the operations per second of a linear layer's product, each multiplication and each addition counted.

    Args:
        device: Where.
        dtype: Of the numbers.
        width: D; the layer is D x 4 D, as in a block's MLP.
        tokens: Rows; of very many not all are taken.
    """
    tokens = min(tokens, _MOST_ROWS_ON_CPU if device.type == "cpu" else _MOST_ROWS)
    streams = torch.ones(tokens, width, device=device, dtype=dtype)
    weight = torch.ones(width, 4 * width, device=device, dtype=dtype)
    timer = Timer(
        "streams @ weight", globals={"streams": streams, "weight": weight}, num_threads=torch.get_num_threads()
    )
    timer.timeit(1)  # the first takes longer
    return 2 * streams.numel() * 4 * width / timer.blocked_autorange(min_run_time=_SECONDS).median

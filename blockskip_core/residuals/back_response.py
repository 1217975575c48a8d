"""How the skipped back span responds to a change of its input, to first order.

Difference from the paper: DiT-BlockSkip (arXiv 2603.20755, Sec. 3.3, Eq. 3) replays a constant that was measured on the
untrained weights, although the span's input changes as the LoRA learns, and lets the gradient pass as if the span were
not there. With h the image tokens that enter the span, d what it adds to them, and one matrix J,

    stored     c = d(h) - J h
    replayed   h' -> h' + c + J h'  =  h' + d(h) + J (h' - h)

So the replay is still exact before anything is learned, a draw takes no more space than before, and the gradient passes
through I + J. J is the ridge regression of d on h over the tokens of some draws, which needs no extra pass.

Axis legend: ``N`` image tokens, ``D`` width of a token. Matrices act on rows: J h is ``h @ J``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

BackResidual = Literal["constant", "linear", "exact"]
BACK_RESIDUALS: tuple[str, ...] = get_args(BackResidual)
RIDGE = 0.01  # of the mean variance of h; limits the effect of directions that hardly occur


def fit_response(pairs: Iterable[tuple[Tensor, Tensor]], ridge: float = RIDGE) -> Tensor:
    """Return J by ridge regression with an intercept, shape (D, D), in the pairs' dtype, on the CPU.

    Args:
        pairs: (h, d) of some draws, each of shape (..., N, D); at least one.
        ridge: Penalty in units of the mean variance of h.
    """
    seen = iter(pairs)
    h, d = next(seen)
    moments = _Moments(h, d)
    moments.add(h, d)
    for h, d in seen:
        moments.add(h, d)
    return moments.regression(ridge)


class _Moments:
    """Running sums for a regression, centred on the first pair's means to avoid cancellation with large offsets.

    Products are computed on the tokens' device and summed on the CPU, because not every device has float64.
    """

    def __init__(self, h: Tensor, d: Tensor) -> None:
        self.dtype = h.dtype
        self.working = torch.promote_types(h.dtype, torch.float32)
        self.shifts = [x.to(self.working).flatten(0, -2).mean(0) for x in (h, d)]
        width = h.shape[-1]
        self.count = 0
        self.sum_h, self.sum_d = torch.zeros(2, width, dtype=torch.float64)
        self.sum_hh, self.sum_hd = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, h: Tensor, d: Tensor) -> None:
        """Add a pair."""
        h, d = (x.to(self.working).flatten(0, -2) - shift for x, shift in zip((h, d), self.shifts, strict=True))
        self.count += len(h)
        self.sum_h += h.sum(0).cpu()
        self.sum_d += d.sum(0).cpu()
        self.sum_hh += (h.T @ h).cpu()
        self.sum_hd += (h.T @ d).cpu()

    def regression(self, ridge: float) -> Tensor:
        """Return the matrix."""
        mean_h, mean_d = self.sum_h / self.count, self.sum_d / self.count
        covariance = self.sum_hh / self.count - torch.outer(mean_h, mean_h)
        crossed = self.sum_hd / self.count - torch.outer(mean_h, mean_d)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-30))
        return torch.linalg.solve(covariance, crossed).to(self.dtype)


def constant_part(added: Tensor, entering: Tensor, response: Tensor) -> Tensor:
    """Return c = d - J h, shape (..., N, D), in the dtype of ``added``; rounds J h as the replay does."""
    wide = torch.promote_types(added.dtype, torch.float32)
    linear = entering @ response.to(entering.device)
    return (added.to(wide) - linear.to(wide)).to(added.dtype)

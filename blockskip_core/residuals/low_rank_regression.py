"""Ridge regression by a diagonal plus a low rank, from running moments.

With tokens h and what is added to them d, both centred, S = E[h h^T] + ridge, C = E[h d^T] and S = R^T R (Cholesky), the
ridge regression of d on h is J = S^-1 C. Its loss for any other map M is, up to a constant, that of a matrix
approximation, so restricting M to a diagonal plus a rank r leaves

    min over a, U, V of  || G - R diag(a) - W V ||_F^2       G = R^-T C,  W = R U

Each of a, W and V has a closed form given the other two. Taking them in turn never raises the loss, and W and V in turn
are orthogonal iteration, whose limit is the best rank r (Eckart and Young). If r is D, the first turn is exact.

Axis legend: ``N`` tokens, ``D`` width, ``r`` rank. Maps act on rows: M h is ``h @ M``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 100
ENOUGH = 1e-3  # stop when a round lowers the loss by a smaller share
_EMPTY = 1e-30  # keeps an input without variance solvable


class Moments:
    """Running sums for a regression of d on h, centred on the first pair's means to avoid cancellation.

    Products are computed on the tokens' device, in float32 at least, and summed on the CPU in float64, because not
    every device has float64.

    Args:
        h, d: Any pair, shape (..., N, D); it sets the centre and is not added.
    """

    def __init__(self, h: Tensor, d: Tensor) -> None:
        self._working = torch.promote_types(h.dtype, torch.float32)
        self._shifts = [x.to(self._working).flatten(0, -2).mean(0) for x in (h, d)]
        width = h.shape[-1]
        self._count = 0
        self._sum_h, self._sum_d = torch.zeros(2, width, dtype=torch.float64)
        self._sum_hh, self._sum_hd = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, h: Tensor, d: Tensor) -> None:
        """Add a pair, each of shape (..., N, D)."""
        h, d = (x.to(self._working).flatten(0, -2) - shift for x, shift in zip((h, d), self._shifts, strict=True))
        self._count += len(h)
        self._sum_h += h.sum(0).cpu()
        self._sum_d += d.sum(0).cpu()
        self._sum_hh += (h.T @ h).cpu()
        self._sum_hd += (h.T @ d).cpu()

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means of h and d, each of shape (D,), float64."""
        sums = zip(self._shifts, (self._sum_h, self._sum_d), strict=True)
        mean_h, mean_d = (shift.cpu().double() + total / self._count for shift, total in sums)
        return mean_h, mean_d

    def covariances(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return S = E[h h^T] + ridge times its mean diagonal, and C = E[h d^T], each (D, D), float64."""
        mean_h, mean_d = self._sum_h / self._count, self._sum_d / self._count
        covariance = self._sum_hh / self._count - torch.outer(mean_h, mean_h)
        crossed = self._sum_hd / self._count - torch.outer(mean_h, mean_d)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(_EMPTY) + _EMPTY)
        return covariance, crossed


@dataclass(frozen=True)
class DiagonalLowRank:
    """A map diag(a) + U V: ``diagonal`` (D,), ``down`` U (D, r), ``up`` V (r, D)."""

    diagonal: Tensor
    down: Tensor
    up: Tensor

    def added(self, h: Tensor) -> Tensor:
        """Return h @ (diag(a) + U V), shape (..., D)."""
        return h * self.diagonal + (h @ self.down) @ self.up


def ridge_regression(moments: Moments, ridge: float) -> Tensor:
    """Return the unrestricted map J, shape (D, D), float64.

    Args:
        moments: Of the pairs to fit.
        ridge: Penalty in units of the mean variance of h.
    """
    return torch.linalg.solve(*moments.covariances(ridge))


def diagonal_low_rank_regression(moments: Moments, rank: int, ridge: float) -> DiagonalLowRank:
    """Return the map diag(a) + U V of the smallest ridge loss, float64; see the module.

    Args:
        moments: Of the pairs to fit.
        rank: r, at least 1; more than D is the same as D.
        ridge: Penalty in units of the mean variance of h.
    """
    covariance, crossed = moments.covariances(ridge)
    root = torch.linalg.cholesky(covariance, upper=True)
    goal = torch.linalg.solve_triangular(root.T, crossed, upper=False)
    lengths = covariance.diagonal()  # of the columns of R, squared
    diagonal = torch.zeros_like(lengths)
    up = _start(min(rank, len(lengths)), len(lengths))
    left, loss = goal, torch.inf
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(left @ up.T).Q  # W, up to a change of basis that V takes back
        up = basis.T @ left
        rest = left - basis @ up
        step = (root * rest).sum(0) / lengths
        diagonal = diagonal + step
        left = goal - root * diagonal
        before, loss = loss, (rest - root * step).square().sum().item()
        if before - loss <= ENOUGH * loss:
            break
    return DiagonalLowRank(diagonal, torch.linalg.solve_triangular(root, basis, upper=True), up)


def _start(rank: int, width: int) -> Tensor:
    """Return r orthonormal rows, shape (r, D): any will do that the answer is not orthogonal to."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q.T

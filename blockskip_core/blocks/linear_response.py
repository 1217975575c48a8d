"""A linear answer of the skipped back span to a change of its input, with its own map in each band of noise levels.

    J_b = diag(a_b) + U_b V_b        in band b; U_b (D, r) and V_b (r, D), r much smaller than D

Blocks are modulated by the noise level, so one matrix for all levels is a compromise. A diagonal plus a low rank takes
``(2 r + 1) D`` numbers instead of D * D, so several of them take less room than one matrix. Not in the paper. How they
are fitted is in ``residuals.back_response``.

Axis legend: ``K`` bands, ``B`` rows, ``N`` image tokens, ``D`` width, ``r`` rank. Maps act on rows: J h is ``h @ J``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearResponse:
    """The maps of all bands.

    Attributes:
        edges: Noise levels between neighbouring bands, ascending, shape (K - 1,), float64; always on the CPU, because
            not every device has float64.
        diagonal: a, shape (K, D).
        down: U, shape (K, D, r).
        up: V, shape (K, r, D).
    """

    edges: Tensor
    diagonal: Tensor
    down: Tensor
    up: Tensor

    def bands(self, sigmas: Sequence[float]) -> Tensor:
        """Return the band of each noise level, shape (B,), on the CPU; a level on an edge belongs to the band below."""
        return torch.bucketize(torch.tensor(sigmas, dtype=torch.float64), self.edges)

    def added(self, h: Tensor, bands: Tensor) -> Tensor:
        """Return J h with each row's band, shape (B, N, D).

        Args:
            h: Tokens, shape (B, N, D), in the dtype of the maps and on their device.
            bands: From :meth:`bands`, on the same device.
        """
        return h * self.diagonal[bands, None] + (h @ self.down[bands]) @ self.up[bands]

    def copied_to(self, device: torch.device) -> LinearResponse:
        """Return a copy with the maps on a device."""
        maps = (x.to(device, copy=True) for x in (self.diagonal, self.down, self.up))
        return LinearResponse(self.edges.clone(), *maps)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"edges": self.edges, "diagonal": self.diagonal, "down": self.down, "up": self.up}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LinearResponse:
        """Build a response from what :meth:`tensors` returned."""
        return cls(tensors["edges"], tensors["diagonal"], tensors["down"], tensors["up"])

    @classmethod
    def zeros(cls, bands: int, width: int, rank: int, dtype: torch.dtype) -> LinearResponse:
        """Return a response of this size that adds nothing."""
        return cls(
            torch.zeros(bands - 1, dtype=torch.float64),
            torch.zeros(bands, width, dtype=dtype),
            torch.zeros(bands, width, rank, dtype=dtype),
            torch.zeros(bands, rank, width, dtype=dtype),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

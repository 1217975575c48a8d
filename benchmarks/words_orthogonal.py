"""Orthogonal directions in place of independent ones. Part of the benchmark ``words``.

The rows are the first of a random rotation, times the root of their length. So the mean of e e^T is still I, and an
estimate right on average, but its variance is smaller. For one example of gradient g and d numbers, n independent
directions give an estimate of mean square (d + n + 1) / n |g|^2, orthogonal ones d / n |g|^2.

Source: Choromanski et al., "Structured evolution with compact architectures for scalable policy optimization" (2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal(normal: Tensor) -> Tensor:
    """Return orthogonal rows of length sqrt(numbers) that span what standard normal rows, (count <= numbers, numbers), span."""
    rotation, lengths = torch.linalg.qr(normal.double().T)
    signs = lengths.diagonal().sign()  # without them the rotation is not uniform
    return (rotation * signs).T.to(normal) * math.sqrt(normal.shape[1])

"""The random directions in which a word is perturbed: standard normal, from the CPU's generator.

A direction is a function of (seed, step), so none is stored, and a resumed run draws the same ones on any device.

Source: ZOODiP (arXiv 2503.14868), Eq. 3: e_i ~ N(0, I).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator_of(*parts: object) -> torch.Generator:
    """Return a generator on the CPU that is determined by some values, e.g. a seed, a purpose and a step."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") % 2**63)


def directions(seed: int, step: int, count: int, numbers: int) -> Tensor:
    """Return the directions of a step, shape (count, numbers), float32."""
    return torch.randn(count, numbers, generator=generator_of("directions", seed, step))

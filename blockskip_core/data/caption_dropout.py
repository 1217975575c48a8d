"""Which training examples lose their caption, for classifier-free guidance (arXiv 2207.12598, Algorithm 1).

The paper decides for every example by itself, with probability p. A run has few examples, so here the share is exact:
round(p * examples) of them, drawn without replacement. The stream of random numbers is one of its own, so pictures,
noise levels, crops and noise are the same at any share.
"""

from __future__ import annotations

from random import Random


def dropped_draws(num_draws: int, share: float, seed: int) -> list[int]:
    """Return the indices of the examples that are trained with the empty caption, in order.

    Args:
        num_draws: Number of examples.
        share: From 0 to 1.
        seed: The schedule's seed.
    """
    return sorted(Random(f"caption dropout {seed}").sample(range(num_draws), round(share * num_draws)))

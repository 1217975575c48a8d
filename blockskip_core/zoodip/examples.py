"""Which picture, noise level and noise each step uses.

Partial uniform timestep sampling (ZOODiP, arXiv 2503.14868): noise levels are uniform between two bounds instead of
over all of them. Here bounds are shares of the model's training time, 0 clean and 1 noise; 0 and 1 are the plain
uniform levels.

Difference from the paper: with ``pool`` a fixed number of examples is drawn once, so that every stratum of noise levels
and every picture occurs equally often, and each round uses all of them in a new order. Losses of different steps are
then comparable, and less of an estimate's variance comes from the examples. With a pool of 0 every step draws a new
one, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InvalidInputError
from .directions import generator_of

LARGEST_SEED = 2**62


@dataclass(frozen=True)
class Example:
    """A training example.

    Attributes:
        picture: Index of the picture.
        mirrored: Whether it is mirrored.
        level: Noise level as a share of the model's training time, 0 clean, 1 noise.
        noise_seed: Determines the noise.
    """

    picture: int
    mirrored: bool
    level: float
    noise_seed: int

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Return its noise, standard normal, float32 on the CPU."""
        return torch.randn(tuple(shape), generator=torch.Generator(device="cpu").manual_seed(self.noise_seed))


class ExampleSchedule:
    """The examples of a run, each a function of (seed, step).

    Args:
        seed: Determines all examples.
        num_pictures: Number of pictures.
        lowest, highest: Bounds of the noise level, 0 <= lowest < highest <= 1.
        pool: Number of fixed examples; 0 draws a new one for each step.
        mirror: Whether half of the examples are mirrored.

    Raises:
        InvalidInputError: If a number is out of range.
    """

    def __init__(
        self, seed: int, num_pictures: int, *, lowest: float, highest: float, pool: int = 0, mirror: bool = False
    ) -> None:
        if num_pictures < 1 or pool < 0:
            raise InvalidInputError(f"There must be pictures and no negative pool, got {num_pictures} and {pool}.")
        if not 0.0 <= lowest < highest <= 1.0:
            raise InvalidInputError(
                f"Noise levels need 0 <= lowest < highest <= 1, got {lowest} and {highest}. The paper's are 0.5 and 0.9."
            )
        self._seed, self._pictures, self._mirror = seed, num_pictures, mirror
        self._lowest, self._highest = lowest, highest
        self._pool = self._drawn(generator_of("pool", seed), pool) if pool else []
        self._order = lru_cache(maxsize=2)(self._order_of_round)

    def __getitem__(self, step: int) -> Example:
        """Return the example of a step, from 0."""
        if not self._pool:
            return self._drawn(generator_of("example", self._seed, step), 1)[0]
        round_, place = divmod(step, len(self._pool))
        return self._pool[self._order(round_)[place]]

    def spread(self, count: int) -> list[Example]:
        """Return examples for a check before the run: one from each of ``count`` strata of noise levels."""
        return self._drawn(generator_of("spread", self._seed), count)

    def _drawn(self, generator: torch.Generator, count: int) -> list[Example]:
        """Draw examples, one per stratum of noise levels and equally many per picture, each in random order."""
        strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        levels = self._lowest + (self._highest - self._lowest) * strata / count
        named = torch.randperm(
            self._pictures, generator=generator
        )  # some occur once more than others: not always the first
        pictures = named[torch.randperm(count, generator=generator) % self._pictures]
        mirrored = torch.randint(2, (count,), generator=generator) * self._mirror
        seeds = torch.randint(LARGEST_SEED, (count,), generator=generator)
        columns = (pictures.tolist(), mirrored.bool().tolist(), levels.tolist(), seeds.tolist())
        return [Example(*values) for values in zip(*columns, strict=True)]

    def _order_of_round(self, number: int) -> list[int]:
        return torch.randperm(len(self._pool), generator=generator_of("order", self._seed, number)).tolist()

"""Training examples: clean latents that the model sampled itself, with seeded noise at seeded noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InvalidInputError

SMALLEST_SIGMA = 0.02  # a velocity is a difference divided by sigma: below this, it is mostly rounding error
_NUM_LEVELS = 10  # noise levels at which the held-out error is measured
_HELD_OUT = 8  # every eighth prompt's latents are held out, at least one
_WITH_NEGATIVE = 5
_MIXED = 0x9E3779B97F4A7C15  # odd, so that neighbouring examples get generators that are far apart


def levels_within(low: float, high: float) -> tuple[float, ...]:
    """Return the noise levels at which the held-out error is measured, rising: the middles of equal parts of a range."""
    return tuple(low + (high - low) * ((part + 0.5) / _NUM_LEVELS) for part in range(_NUM_LEVELS))


def levels_through(level: Callable[[float], float]) -> tuple[float, ...]:
    """Return noise levels at which the held-out error is measured, rising: the middles of equal shares of the examples.

    Args:
        level: Number between 0 and 1 -> noise level, falling.
    """
    return tuple(level(1.0 - (part + 0.5) / _NUM_LEVELS) for part in range(_NUM_LEVELS))


LEVELS = levels_within(0.0, 1.0)


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Attributes:
        noisy: (B, C, H, W).
        sigmas: (B,).
        captions: Index of each one's caption.
    """

    noisy: Tensor
    sigmas: Tensor
    captions: Sequence[int]


class Examples:
    """Clean latents with captions, split into those to train on and those held out.

    Whole captions are held out, so that no held-out picture's text is trained on.

    Args:
        latents: Clean, in the model's own scale, (P, C, H, W), float32.
        captions: Index of each one's caption.
        level: Number between 0 and 1 -> noise level; how training spreads over noise levels.
        seed: Of noise levels and noise.
        negative: A caption that takes the place of the latent's own in every fifth example, for models that are sampled
            with guidance; None for none.
        levels: Noise levels at which the held-out error is measured.

    Raises:
        InvalidInputError: If there are fewer than two captions, one of which would be held out.
    """

    def __init__(
        self,
        latents: Tensor,
        captions: Sequence[int],
        level: Callable[[float], float],
        seed: int,
        negative: int | None = None,
        levels: Sequence[float] = LEVELS,
    ) -> None:
        different = list(dict.fromkeys(captions))
        if len(different) < 2:
            raise InvalidInputError(
                f"At least 2 prompts are needed, because one is held out to measure the error, got {len(different)}."
            )
        held = set(different[:: min(_HELD_OUT, len(different))])
        self._latents, self._captions, self._level, self._seed = latents, list(captions), level, seed
        self._negative, self.levels = negative, tuple(levels)
        self.trained = [index for index, caption in enumerate(captions) if caption not in held]
        self.held_out = [index for index, caption in enumerate(captions) if caption in held]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the examples of these numbers; each depends on its number and the seed only."""
        found = self._noisy([self._drawn(number) for number in numbers])
        return replace(found, captions=[self.caption_of(number) for number in numbers])

    def caption_of(self, number: int) -> int:
        """Return the caption of the example of a number."""
        if self._negative is not None and number % _WITH_NEGATIVE == 0:
            return self._negative
        return self._captions[self._drawn(number)[0]]

    def held_out_batches(self, most: int) -> list[Batch]:
        """Return held-out examples, a batch of one per latent and level of ``levels``, level by level.

        Args:
            most: Latents, at most; of as many captions as possible.
        """
        chosen = list(enumerate(self._in_turn(self.held_out)[:most]))
        return [
            self._noisy([(index, level, self._seed ^ (number * _MIXED))])
            for level in self.levels
            for number, index in chosen
        ]

    def _in_turn(self, latents: Sequence[int]) -> list[int]:
        """Return latents in an order that takes one of every caption before it takes another of the same."""
        seen: dict[int, int] = {}
        turns = []
        for index in latents:
            caption = self._captions[index]
            turns.append(seen.get(caption, 0))
            seen[caption] = turns[-1] + 1
        return [index for _, index in sorted(zip(turns, latents, strict=True))]

    def _drawn(self, number: int) -> tuple[int, float, int]:
        """Return latent, noise level and noise seed of an example."""
        generator = torch.Generator().manual_seed((self._seed + (number + 1) * _MIXED) % 2**63)
        place = int(torch.randint(len(self.trained), (1,), generator=generator))
        level = self._level(float(torch.rand(1, generator=generator)))
        noise = int(torch.randint(2**62, (1,), generator=generator))
        return self.trained[place], min(max(level, SMALLEST_SIGMA), 1.0), noise

    def _noisy(self, drawn: Sequence[tuple[int, float, int]]) -> Batch:
        clean = self._latents[[index for index, _, _ in drawn]].float()
        sigmas = torch.tensor([level for _, level, _ in drawn])
        noise = [
            torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed % 2**63)) for _, _, seed in drawn
        ]
        weight = sigmas[:, None, None, None]
        noisy = (1.0 - weight) * clean + weight * torch.stack(noise)
        return Batch(noisy, sigmas, [self._captions[index] for index, _, _ in drawn])

"""Operations of a step by its number of tokens, from counts of the model itself.

Everything in a transformer costs in proportion to its tokens, except attention, which costs in proportion to their square.
So three counts at three numbers of image tokens give the operations at any number, exactly, for texts of one length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InvalidInputError


@dataclass(frozen=True)
class StepOperations:
    """The operations of one call of the model; a multiply-add is 2.

    Attributes:
        constant, linear, quadratic: Of the polynomial in the number of image tokens.
        text_tokens: Of the text with which they were counted.
    """

    constant: float
    linear: float
    quadratic: float
    text_tokens: int

    @staticmethod
    def through(counts: Mapping[int, float], text_tokens: int) -> StepOperations:
        """Return the polynomial through counts at three numbers of image tokens.

        Raises:
            InvalidInputError: If there are not three.
        """
        if len(counts) != 3:
            raise InvalidInputError(f"Operations are counted at 3 numbers of tokens, got {sorted(counts)}.")
        (a, fa), (b, fb), (c, fc) = sorted(counts.items())
        first, second = (fb - fa) / (b - a), (fc - fb) / (c - b)
        quadratic = (second - first) / (c - a)
        linear = first - quadratic * (a + b)
        return StepOperations(fa - linear * a - quadratic * a * a, linear, quadratic, text_tokens)

    def own(self, tokens: int) -> float:
        """Return the operations of a step with the model's own patches."""
        return self.constant + self.linear * tokens + self.quadratic * tokens * tokens

    def coarse(self, tokens: int, scale: int, trained: int) -> float:
        """Return the operations of a coarse step of the same picture.

        Args:
            tokens: Image tokens with the model's own patches.
            scale: s.
            trained: Parameters of the adapter, each of which meets every token; for the LoRA of a layer that only sees
                some tokens this counts too many.
        """
        fewer = tokens // scale**2
        return self.own(fewer) + 2.0 * trained * (fewer + self.text_tokens)


def share_saved(scales: Sequence[int], operations: Mapping[int, float]) -> float:
    """Return the share of operations that a schedule saves, between 0 and 1.

    Args:
        scales: Of every step.
        operations: Scale -> operations of a step, also of scale 1.
    """
    return 1.0 - sum(operations[scale] for scale in scales) / (len(scales) * operations[1])

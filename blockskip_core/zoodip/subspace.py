"""Subspace gradient: directions along which the recent words hardly varied are taken out of the gradient.

Source: ZOODiP (arXiv 2503.14868), Eq. 4-8. The words after each of the last tau steps are standardised number by number
(Eq. 4) and decomposed (Eq. 5). With i* the first component up to which more than 1 - nu of the variance is explained
(Eq. 6), the components after i* (Eq. 7) are removed from the gradients of the next tau steps (Eq. 8). During the
first tau steps nothing is removed.

Only directions inside the span of tau words can be removed; all others stay.

Difference from the paper: components without any variance are not removed. There is always one, because of the mean
that Eq. 4 subtracts, and it is arbitrary: it is determined by rounding errors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidInputError


def minor_components(words: Tensor, share: float) -> Tensor:
    """Return the directions of least variance, as orthonormal rows: P_nu of Eq. 7.

    Args:
        words: The word after each of tau steps, shape (tau, numbers).
        share: nu, the share of the variance that the removed components may explain, in (0, 1).

    Returns:
        Shape (removed, numbers).
    """
    centred = words - words.mean(0)
    spread = centred.square().mean(0).sqrt()
    standard = torch.where(spread > 0, centred / spread.clamp_min(torch.finfo(words.dtype).tiny), 0.0)
    _, values, components = torch.linalg.svd(standard, full_matrices=False)
    explained = values.square().cumsum(0) / values.square().sum().clamp_min(torch.finfo(words.dtype).tiny)
    first = int((explained <= 1.0 - share).sum())  # i*, from 0
    noise = values[0] * max(words.shape) * torch.finfo(words.dtype).eps
    return components[first + 1 :][values[first + 1 :] > noise]


def without(gradient: Tensor, components: Tensor) -> Tensor:
    """Return the gradient without its part along orthonormal rows: g (I - P^T P), Eq. 8."""
    return gradient - components.T @ (components @ gradient)


class SubspaceGradient:
    """Collects the words of a run and projects its gradients.

    Args:
        numbers: Length of a word's row.
        every: tau, the number of steps between two decompositions; 0 turns the projection off.
        share: nu.

    Raises:
        InvalidInputError: If tau or nu is out of range.
    """

    def __init__(self, numbers: int, every: int, share: float) -> None:
        if every < 0 or every == 1 or not 0.0 < share < 1.0:
            raise InvalidInputError(
                "The subspace needs 0 or at least 2 steps between decompositions and a share between 0 and 1, got "
                f"{every} and {share}."
            )
        self._every, self._share = every, share
        self._words = torch.empty(0, numbers)
        self._removed = torch.empty(0, numbers)

    @property
    def num_removed(self) -> int:
        """Number of directions that are removed at present."""
        return len(self._removed)

    def project(self, gradient: Tensor) -> Tensor:
        """Return the gradient without the removed directions."""
        return without(gradient, self._removed.to(gradient)) if self.num_removed else gradient

    def add(self, word: Tensor) -> None:
        """Record the word after a step, shape (numbers,); after every tau-th one, choose anew what is removed."""
        if not self._every:
            return
        self._words = torch.cat([self._words.to(word), word[None]])
        if len(self._words) == self._every:
            self._removed = minor_components(self._words, self._share)
            self._words = self._words[:0]

    def state(self) -> dict[str, Tensor]:
        """Return copies of what the next steps depend on."""
        return {"words": self._words.clone(), "removed": self._removed.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a state."""
        self._words, self._removed = state["words"].clone(), state["removed"].clone()

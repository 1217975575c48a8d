"""A latent whose tokens have two sizes, kept as a full-size latent: a coarse token appears four times.

A coarse token covers two by two fine ones, its group. Samplers, guidance, previews and masks see an ordinary latent of
full size; only the model sees each coarse token once (:meth:`MixedGrid.pick`), and its output is copied back to all
four (:meth:`MixedGrid.spread`).

A row of tokens can also be laid out as a strip, a latent that is one token high: a model that cuts latents into tokens
row by row then sees these tokens in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..errors import InvalidInputError


@dataclass(frozen=True)
class TokenPlaces:
    """Where tokens are.

    Attributes:
        rows, columns: Place of each token, shape (1 or B, N), float32; (1, N) if all samples agree.
        grid: Rows and columns of the whole picture in the same unit.
    """

    rows: Tensor
    columns: Tensor
    grid: tuple[int, int]


class MixedGrid:
    """Which groups of each sample are four fine tokens and which are one coarse one.

    Tokens are in raster order of their upper left corners. If all groups are fine, that is the order of a full-size
    latent; if none is, that of a latent of half the side.

    Args:
        fine: Shape (B, h, w), boolean; h and w count groups. Every sample has the same number of fine groups.

    Raises:
        InvalidInputError: If samples have different numbers of fine groups.
    """

    def __init__(self, fine: Tensor) -> None:
        counts = fine.flatten(1).sum(1)
        if not bool((counts == counts[0]).all()):
            raise InvalidInputError(
                f"All pictures of a batch must have equally many fine regions, got {counts.tolist()}."
            )
        self.fine = fine
        batch, rows, columns = fine.shape
        self._width = 2 * columns
        corner = torch.zeros(batch, 2 * rows, 2 * columns, dtype=torch.bool, device=fine.device)
        corner[:, ::2, ::2] = True
        every = repeat(fine, "b h w -> b (h two) (w dos)", two=2, dos=2)
        kept = (every | corner).flatten(1)
        self._picked = kept.nonzero()[:, 1].reshape(batch, -1)  # (B, N), indices into the full grid
        own = torch.arange(kept.shape[1], device=fine.device).expand(batch, -1)
        first = (own // self._width // 2 * 2) * self._width + own % self._width // 2 * 2
        place = kept.long().cumsum(1) - 1  # index of a kept token among the kept ones
        self._source = place.gather(1, torch.where(every.flatten(1), own, first))  # (B, 4 h w)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model sees."""
        return self._picked.shape[1]

    def pick(self, latent: Tensor, patch: int) -> Tensor:
        """Return the tokens of a full-size latent, shape (B, C, H, W) -> (B, N, C, patch, patch).

        B may be a multiple of this grid's batch; then the samples repeat, as when guided and unguided passes are
        batched.

        Raises:
            InvalidInputError: If it is not.
        """
        tokens = tokens_of(latent, patch)
        return tokens.gather(1, _index(self._repeated(self._picked, len(tokens)), tokens))

    def spread(self, tokens: Tensor) -> Tensor:
        """Return a full-size latent in which every coarse token appears four times; the inverse of :meth:`pick`."""
        source = self._repeated(self._source, len(tokens))
        return latent_of(tokens.gather(1, _index(source, tokens)), self._width)

    def places(self, batch: int, unit: float = 0.5) -> TokenPlaces:
        """Return where the tokens are.

        Args:
            batch: A multiple of this grid's batch.
            unit: Distance of two fine neighbours: 0.5 counts in coarse tokens, 1 in fine ones.
        """
        picked = self._picked if len(self.fine) == 1 else self._repeated(self._picked, batch)
        rows, columns = picked // self._width, picked % self._width
        _, height, width = self.fine.shape
        return TokenPlaces(rows * unit, columns * unit, (int(2 * height * unit), int(2 * width * unit)))

    def to(self, device: torch.device) -> MixedGrid:
        """Return this grid on a device."""
        return self if self.fine.device == device else MixedGrid(self.fine.to(device))

    def _repeated(self, index: Tensor, batch: int) -> Tensor:
        if batch == 0 or batch % len(index):
            raise InvalidInputError(
                f"The model was called on {batch} pictures at a time, but {len(index)} belong together. Another node "
                "divides the batch; remove it, or set the batch size to 1."
            )
        return index.repeat(batch // len(index), 1)


def _index(index: Tensor, tokens: Tensor) -> Tensor:
    return index.reshape(*index.shape, 1, 1, 1).expand(-1, -1, *tokens.shape[2:])


def tokens_of(latent: Tensor, patch: int) -> Tensor:
    """Cut a latent into tokens in raster order, shape (B, C, H, W) -> (B, N, C, patch, patch)."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) c p q", p=patch, q=patch)


def latent_of(tokens: Tensor, columns: int) -> Tensor:
    """Put tokens in raster order together; the inverse of :func:`tokens_of`."""
    return rearrange(tokens, "b (h w) c p q -> b c (h p) (w q)", w=columns)


def strip_of(tokens: Tensor) -> Tensor:
    """Lay tokens out as a latent that is one token high, shape (B, N, C, p, p) -> (B, C, p, N p)."""
    return rearrange(tokens, "b n c p q -> b c p (n q)")


def tokens_of_strip(strip: Tensor, patch: int) -> Tensor:
    """Take the tokens of a strip; the inverse of :func:`strip_of`."""
    return rearrange(strip, "b c p (n q) -> b n c p q", q=patch)


def upsampled(latent: Tensor, patch: int) -> Tensor:
    """Return a latent of twice the side in which every token appears four times.

    This copies tokens, not cells: the inside of a token keeps its layout.
    """
    tokens = rearrange(latent, "b c (h p) (w q) -> b c h p w q", p=patch, q=patch)
    return repeat(tokens, "b c h p w q -> b c (h two p) (w dos q)", two=2, dos=2)


def groups_of(latent: Tensor, patch: int) -> Tensor:
    """Sort the tokens of a full-size latent into groups, shape (B, C, H, W) -> (B, G, 4, D)."""
    return rearrange(latent, "b c (h two p) (w dos q) -> b (h w) (two dos) (c p q)", two=2, dos=2, p=patch, q=patch)


def latent_of_groups(groups: Tensor, columns: int, patch: int) -> Tensor:
    """Put groups together; the inverse of :func:`groups_of`. ``columns`` counts groups."""
    pattern = "b (h w) (two dos) (c p q) -> b c (h two p) (w dos q)"
    return rearrange(groups, pattern, w=columns, two=2, dos=2, p=patch, q=patch)

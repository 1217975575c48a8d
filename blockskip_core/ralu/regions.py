"""Which regions become fine early: those with edges, where upsampling a latent leaves artefacts.

Source: RALU (arXiv 2507.08422), section on region-adaptive upsampling. The clean estimate of the first stage is decoded,
and the tokens with the most edge pixels (Canny) are chosen. A variant in the paper uses gradients of the latent instead
and needs no decoding; the paper gives no kernel for it, so the Sobel kernel is our choice.

Difference from the published code: it passes the decoder's output, which is in [-1, 1], to Canny as if it were in
[0, 1], so the dark half of a picture has no edges. Here the whole range counts, and the published behaviour is an
option.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidInputError

# Thresholds of OpenCV's Canny in the published code, 100 and 200 of 255. Kornia's gradient is a root of squares,
# OpenCV's a sum.
_CANNY_LOW, _CANNY_HIGH = 100 / 255, 200 / 255
_TIE_BREAK = 1e-6


def edge_scores(pictures: Tensor, grid: tuple[int, int], *, bright_half_only: bool = False) -> Tensor:
    """Return the share of edge pixels in each token.

    Args:
        pictures: Decoded clean estimates, shape (B, H, W, 3), values in [0, 1].
        grid: Rows and columns of tokens; H and W must be multiples of them.
        bright_half_only: Clip the dark half to black first, as the published code does.

    Returns:
        Shape (B, rows, columns).
    """
    from kornia.filters import canny

    planes = pictures.movedim(-1, 1).float()
    if bright_half_only:
        planes = (2.0 * planes - 1.0).clamp(0.0, 1.0)
    _, edges = canny(planes, _CANNY_LOW, _CANNY_HIGH, kernel_size=(1, 1))
    return _mean_per_token(edges[:, 0], grid)


def gradient_scores(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how much the latent changes within each token.

    Args:
        latents: Clean estimates, shape (B, C, H, W).
        grid: Rows and columns of tokens.

    Returns:
        Shape (B, rows, columns).
    """
    from kornia.filters import sobel

    return _mean_per_token(sobel(latents.float()).mean(1), grid)


def choose_regions(scores: Tensor, ratio: float, forced: Tensor | None, noise: Tensor) -> Tensor:
    """Return the tokens to refine early, the same number in every picture of the batch.

    Args:
        scores: Shape (B, rows, columns); the highest are chosen.
        ratio: Share of the tokens, rounded down.
        forced: Tokens that are chosen first, shape (B or 1, rows, columns), boolean. If they exceed ``ratio``, all of
            them are chosen, and every picture gets as many tokens as the one with the most.
        noise: Standard normal, with the shape of the scores; decides between equal scores.

    Raises:
        InvalidInputError: If the ratio is not between 0 and 1.
    """
    if not 0.0 <= ratio <= 1.0:
        raise InvalidInputError(f"The share of early regions must be between 0 and 1, got {ratio}.")
    scores = scores + _TIE_BREAK * noise
    number = int(scores[0].numel() * ratio)
    if forced is not None:
        scores = scores.masked_fill(forced.expand_as(scores), torch.inf)
        number = max(number, int(forced.flatten(1).sum(1).max()))
    best = scores.flatten(1).topk(number, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).flatten(1).scatter(1, best, True).reshape(scores.shape)


def masked_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the tokens that a mask covers at least half, shape (B, H, W) -> (B, rows, columns), boolean."""
    covered = torch.nn.functional.interpolate(mask[:, None].float(), size=grid, mode="area")
    return covered[:, 0] >= 0.5


def _mean_per_token(values: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(values[:, None], size=grid, mode="area")[:, 0]

"""The noise level that a reduced latent has for the model.

Reducing a latent of noise level sigma keeps its signal and shrinks its noise by g (``PatchResizing.noise_share``):

    reduced = (1 - sigma) clean + sigma g noise

which is a latent of flow matching, scaled. With ``r = 1 / (1 - sigma + sigma g)``, ``r reduced`` is one of noise level
``sigma g r``, so the model gets that latent and that level, and its clean estimate is one of the reduced picture.

Difference from the paper: DDiT (arXiv 2602.16968) gives the model the same noise level at every patch size and leaves the
rest to training. On our small models that did not learn at s = 4, while this did.
"""

from __future__ import annotations

from torch import Tensor


def matched_noise(sigma: Tensor, noise_share: float) -> tuple[Tensor, Tensor]:
    """Return r and the matched noise level.

    Args:
        sigma: Noise levels, between 0 and 1.
        noise_share: g.
    """
    ratio = 1.0 / (1.0 - sigma + sigma * noise_share)
    return ratio, sigma * noise_share * ratio

"""What is trained for one patch size, apart from the LoRA: embedding, de-embedding, identifier and residual block.

Source: DDiT (arXiv 2602.16968): a patch embedding and a de-embedding for patches of side q, a vector that tells the model
the patch size, added to every token, and a small residual block from before the embedding to after the de-embedding.

Embedding and de-embedding are stored as changes of their initial values (``patch_resizing``), so all tensors of a new
adapter are zero where they meet the model, and the coarse step starts as the model on the reduced latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HIDDEN = 256  # width of the residual block; the paper does not give one
_LEVELS = 2  # numbers that tell the residual block the noise level


class PatchAdapter(nn.Module):
    """The trained tensors of one patch size; float32.

    Args:
        numbers: n, numbers of a coarse patch.
        width: Of a token.
        seed: Determines the residual block's first layer; everything else starts at zero.
    """

    def __init__(self, numbers: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        entering = numbers + _LEVELS
        first = torch.empty(HIDDEN, entering).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(entering)
        self.embedding = nn.Parameter(torch.zeros(width, numbers))
        self.identifier = nn.Parameter(torch.zeros(width))
        self.deembedding = nn.Parameter(torch.zeros(numbers, width))
        self.bias = nn.Parameter(torch.zeros(numbers))
        self.residual_in = nn.Parameter(first)
        self.residual_in_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.residual_out = nn.Parameter(torch.zeros(numbers, HIDDEN))

    def embedded(self, patches: Tensor, sigma: Tensor) -> Tensor:
        """Return what is added to the model's embedded tokens.

        Args:
            patches: Noisy coarse patches, (B, N, n); scaled here to a variance that no noise level changes much.
            sigma: (B,).

        Returns:
            (B, N, width).
        """
        scale = ((1.0 - sigma) ** 2 + sigma**2).rsqrt()[:, None, None]
        return nn.functional.linear(patches * scale, self.embedding.to(patches), self.identifier.to(patches))

    def velocity(self, leaving: Tensor, patches: Tensor, sigma: Tensor) -> Tensor:
        """Return what is added to the velocity of every coarse patch, (B, N, n).

        Args:
            leaving: Tokens as they enter the model's own de-embedding, (B, N, width).
            patches: Noisy coarse patches, (B, N, n).
            sigma: (B,).
        """
        added = nn.functional.linear(leaving.to(patches), self.deembedding.to(patches), self.bias.to(patches))
        level = torch.stack((1.0 - sigma, sigma), -1)[:, None].expand(-1, patches.shape[1], -1)
        entering = torch.cat((nn.functional.layer_norm(patches, patches.shape[-1:]), level.to(patches)), -1)
        hidden = nn.functional.linear(entering, self.residual_in.to(patches), self.residual_in_bias.to(patches))
        return added + nn.functional.linear(nn.functional.gelu(hidden), self.residual_out.to(patches))

"""A small diffusion transformer in plain torch: one stream of text, then image tokens, as in FLUX's single blocks.

It works on latents of three channels with one token per cell. It is toy-sized, with the structure of the large models:
embeddings, blocks modulated by time, and a head that reads image tokens only.

Axis legend: ``B`` batch, ``N`` image tokens, ``L`` text tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model import TokenStreams


class SmallBlock(nn.Module):
    """``block(tokens, time, num_text=) -> tokens``: attention, then an MLP, each gated by time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gates = nn.Linear(width, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, time: Tensor, num_text: int) -> Tensor:
        """Return the tokens after the block, shape (B, L + N, D).

        Args:
            tokens: Shape (B, L + N, D).
            time: Shape (B, 1, D).
            num_text: L; used by :class:`TextThenImage` only.
        """
        of_attention, of_mlp = self.gates(time).chunk(2, dim=-1)
        q, k, v = self.qkv(_norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + of_attention * self.proj(attended)
        return tokens + of_mlp * self.down(functional.gelu(self.up(_norm(tokens))))


class SmallDit(nn.Module):
    """The model: ``(noisy latents (B, 3, H, W), sigmas (B,), text (B, L, text_width)) -> velocity (B, 3, H, W)``."""

    def __init__(self, depth: int = 8, width: int = 32, heads: int = 4, text_width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.image_in = nn.Linear(3 + 2, width)  # plus the two coordinates of each cell
        self.text_in = nn.Linear(text_width, width)
        self.time_in = nn.Linear(2, width)
        self.blocks = nn.ModuleList(SmallBlock(width, heads) for _ in range(depth))
        self.out = nn.Linear(width, 3)

    def forward(self, noisy: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        """Return the velocity."""
        time = self.time_in(torch.stack((sigmas, sigmas.square()), dim=-1))[:, None]
        tokens = torch.cat((self.text_in(text), self.image_in(_with_places(noisy).flatten(2).mT)), dim=1)
        for block in self.blocks:
            tokens = block(tokens, time, num_text=text.shape[1])
        return self.out(_norm(tokens[:, text.shape[1] :])).mT.unflatten(2, noisy.shape[2:])


class TextThenImage:
    """How :class:`SmallBlock` takes and returns its tokens; a :class:`~..model.BlockIO`."""

    def entering(self, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        """Return the tokens that a call passes to the block."""
        return TokenStreams(img=args[0][:, kwargs["num_text"] :], txt=args[0][:, : kwargs["num_text"]])

    def leaving(self, result: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> TokenStreams:
        """Return the tokens in the block's result."""
        return self.entering((result,), kwargs)

    def result(self, streams: TokenStreams, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Return tokens in the form of the block's result."""
        assert streams.txt is not None
        return torch.cat((streams.txt, streams.img), dim=1)


def clean_estimate(model: SmallDit, noisy: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    """Return the estimate of the clean latents that follows from the model's velocity."""
    return noisy - sigmas.view(-1, 1, 1, 1) * model(noisy, sigmas, text)


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def _with_places(latents: Tensor) -> Tensor:
    """Return latents with two more channels: the coordinates of each cell."""
    batch, _, rows, columns = latents.shape
    axes = (torch.linspace(-1.0, 1.0, n, dtype=latents.dtype, device=latents.device) for n in (rows, columns))
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat((latents, places.expand(batch, -1, -1, -1)), dim=1)

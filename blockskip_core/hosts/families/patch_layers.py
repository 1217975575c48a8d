"""Where patches enter a model and leave it, so that a trained change can be added there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def first_image_tokens(tokens: Tensor, number: int) -> Tensor:
    """Return the image tokens of a sequence that begins with them, (B, N or more, D) -> (B, N, D)."""
    return tokens[:, :number]


@dataclass(frozen=True)
class PatchLayers:
    """The layers of a model at both ends of its image tokens.

    Attributes:
        embedding: Path of the module that embeds patches; its output is (B, N, D), or (B, D, F, h, w) of a convolution.
        deembedding: Path of the linear layer that turns tokens into patches.
        image_tokens: (tokens that enter the de-embedding, N) -> the image's, (B, N, D).
        between: Paths of modules between the embedding and the blocks that image tokens pass; gradients pass them too.
        clips: Whether image tokens may be those of a clip, frame by frame in raster order.
    """

    embedding: str
    deembedding: str
    image_tokens: Callable[[Tensor, int], Tensor] = first_image_tokens
    between: tuple[str, ...] = ()
    clips: bool = False


def added_to(output: Tensor, change: Tensor) -> Tensor:
    """Return an embedding's output with a change of its tokens, (B, N, D), added in the output's form and dtype."""
    if output.ndim == 3:
        return output + change.to(output)
    return output + change.transpose(1, 2).reshape(output.shape).to(output)

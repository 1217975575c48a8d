"""Coarse patches, and their resizing to the side of the model's own patches and back.

A model's patch embedding is a linear map w of a patch of side p. For patches of side q = s p, FlexiViT (arXiv 2212.08013,
Sec. 3.4) takes the map that gives an enlarged patch the embedding of the patch itself: with B the matrix that enlarges,
``<B x, w'> = <x, w>`` for all x. Its solution of least norm is ``w' = B (B^T B)^-1 w``, the transposed pseudo-inverse
applied to w. Then ``<y, w'> = <B^+ y, w>`` for any patch y: embedding a coarse patch with w' is reducing it with B^+ and
embedding that with w. So the initial values need no weights of their own, and the model's embedding may be quantised or
patched by a LoRA. In the same way the initial de-embedding is the model's own, enlarged with B.

B B^+ is an orthogonal projection: it splits a latent into what the coarse tokens carry and the rest (``connection``).

DDiT (arXiv 2602.16968) enlarges bilinearly. Difference from the paper: the default here copies every value ("nearest"), so
B^+ is a mean over s x s cells. White noise stays white under it, as the model expects; under the bilinear B^+ neighbours
become correlated (-0.23 at p = 2, s = 2).

A clip's latent has its frames among the channels, channel by channel: (B, C F, H, W). Patches are cut from one frame each, so
a coarse token covers s x s tokens of a frame.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from ..errors import InvalidInputError

ResizeKind = Literal["nearest", "bilinear"]
RESIZE_KINDS: tuple[str, ...] = get_args(ResizeKind)


def enlarging_matrix(small: int, large: int, kind: ResizeKind) -> Tensor:
    """Return B for one axis, shape (large, small), float64; rows add up to 1.

    Bilinear as in torch's ``interpolate`` with ``align_corners=False``.
    """
    unit = torch.eye(small, dtype=torch.float64)[None]
    if kind == "nearest":
        return torch.nn.functional.interpolate(unit, size=large, mode="nearest")[0].T.contiguous()
    return torch.nn.functional.interpolate(unit, size=large, mode="linear", align_corners=False)[0].T.contiguous()


class PatchResizing:
    """Patches of one coarse size.

    Args:
        patch: p.
        scale: s, at least 2.
        kind: How patches are enlarged.
        frames: F, of the latents that are cut.

    Attributes:
        side: q.
        noise_share: Standard deviation of white noise after :meth:`reduced`, relative to before.

    Raises:
        InvalidInputError: If a number or the kind cannot be used.
    """

    def __init__(self, patch: int, scale: int, kind: ResizeKind = "nearest", frames: int = 1) -> None:
        if patch < 1 or scale < 2:
            raise InvalidInputError(f"A patch has at least 1 cell and a scale of at least 2, got {patch} and {scale}.")
        if kind not in RESIZE_KINDS:
            raise InvalidInputError(f"Patches are resized {' or '.join(RESIZE_KINDS)}, got {kind!r}.")
        self.patch, self.scale, self.kind, self.side, self.frames = patch, scale, kind, patch * scale, frames
        self._up = enlarging_matrix(patch, self.side, kind)
        self._down = torch.linalg.pinv(self._up)
        self.noise_share = self._down.square().sum(1).mean().item()  # of both axes: a root of the product of two equals

    def of_clips(self, frames: int) -> PatchResizing:
        """Return the same patches for latents of so many frames."""
        same = copy.copy(self)
        same.frames = frames
        return same

    def require_fitting(self, rows: int, columns: int) -> None:
        """Check that a latent is cut into whole coarse patches.

        Raises:
            InvalidInputError: If not.
        """
        if rows % self.side or columns % self.side:
            raise InvalidInputError(
                f"Patches of {self.scale} times the model's side need a latent whose rows and columns are multiples of "
                f"{self.side}, got {rows} x {columns}."
            )

    def tokens(self, latent: Tensor) -> Tensor:
        """Fold: (B, C F, H, W) -> (B, F N, n), frame by frame, tokens in raster order."""
        pattern = "b (c f) (h i) (w j) -> b (f h w) (c i j)"
        return rearrange(latent, pattern, f=self.frames, i=self.side, j=self.side)

    def latent(self, tokens: Tensor, columns: int) -> Tensor:
        """Unfold: the inverse of :meth:`tokens` for a latent with ``columns`` cells in a row."""
        wide = columns // self.side
        pattern = "b (f h w) (c i j) -> b (c f) (h i) (w j)"
        return rearrange(tokens, pattern, f=self.frames, w=wide, i=self.side, j=self.side)

    def reduced(self, latent: Tensor) -> Tensor:
        """Apply B^+ to every coarse patch: (B, C, H, W) -> (B, C, H / s, W / s)."""
        return self._resized(latent, self._down)

    def enlarged(self, latent: Tensor) -> Tensor:
        """Apply B to every patch of the model's own size: (B, C, H / s, W / s) -> (B, C, H, W)."""
        return self._resized(latent, self._up)

    def carried(self, latent: Tensor) -> Tensor:
        """Return the part of a latent that the coarse tokens carry, its orthogonal projection B B^+."""
        return self.enlarged(self.reduced(latent))

    def _resized(self, latent: Tensor, matrix: Tensor) -> Tensor:
        matrix = matrix.to(latent)
        side = matrix.shape[1]
        patches = rearrange(latent, "b c (h i) (w j) -> b c h w i j", i=side, j=side)
        resized = torch.einsum("pi,bchwij,qj->bchwpq", matrix, patches, matrix)
        return rearrange(resized, "b c h w p q -> b c (h p) (w q)")

    def embedding_weight(self, weight: Tensor) -> Tensor:
        """Return FlexiViT's w' for an embedding, (D, C, p, p) -> (D, C, q, q).

        Sampling does not need it, because it applies the model's own w to :meth:`reduced` patches.
        """
        spread = torch.linalg.pinv(self._up.T).to(weight)  # B (B^T B)^-1
        return torch.einsum("ip,dcpq,jq->dcij", spread, weight, spread)

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return row and column of every coarse token in units of the model's own tokens, each (1, F N), float32.

        A coarse token is at the mean place of the tokens that it covers, e.g. 0.5, 2.5, ... for s = 2.
        """
        along = [
            torch.arange(cells // self.side, dtype=torch.float32) * self.scale + (self.scale - 1) / 2
            for cells in (rows, columns)
        ]
        row, column = torch.meshgrid(*along, indexing="ij")
        return row.reshape(1, -1).repeat(1, self.frames), column.reshape(1, -1).repeat(1, self.frames)

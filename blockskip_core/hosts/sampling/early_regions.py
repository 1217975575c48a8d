"""Find the regions to refine early, in a clean estimate or in the picture that the host's VAE decodes from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...errors import InvalidInputError
from ...ralu.noise_matching import seeded_noise
from ...ralu.regions import choose_regions, edge_scores, gradient_scores, masked_tokens
from ..inputs.frames import with_frames

REGIONS = ("edges", "latent gradient", "edges (as published)")


@dataclass(frozen=True, kw_only=True)
class RegionChoice:
    """How the early regions are found.

    Attributes:
        method: One of :data:`REGIONS`.
        ratio: Share of the coarse tokens.
        vae: Decodes the estimate; edges need it.
        mask: Regions that are chosen first, shape (B or 1, H, W), any size.

    Raises:
        InvalidInputError: If there is no such method, the ratio is not in [0, 1], or the mask is not a mask.
    """

    method: str
    ratio: float
    vae: Any | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.method not in REGIONS:
            raise InvalidInputError(f"regions must be one of {', '.join(REGIONS)}, got {self.method!r}.")
        if not 0.0 <= self.ratio <= 1.0:
            raise InvalidInputError(f"The share of early regions must be between 0 and 1, got {self.ratio}.")

        mask = self.mask
        if mask is not None and (mask.ndim not in (2, 3) or 0 in mask.shape or not mask.float().isfinite().all()):
            raise InvalidInputError(
                f"A mask must have rows, columns and finite numbers, got shape {tuple(mask.shape)}. Connect a MASK."
            )

    def check(self) -> None:
        """Make sure that regions can be found, before anything is sampled.

        Raises:
            InvalidInputError: If a VAE is missing.
        """
        if self.method != "latent gradient" and self.vae is None:
            raise InvalidInputError(
                f"Regions by {self.method} are found in the decoded picture, and no VAE came in. Connect `vae`, or set "
                "`regions` to latent gradient."
            )

    def found(
        self, model: Any, clean: Tensor, grid: tuple[int, int], seed: int, indices: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the regions, and the pictures decoded to find them.

        Args:
            model: The host's model (a BaseModel).
            clean: Clean estimates in its own space, shape (B, C, H, W).
            grid: Rows and columns of coarse tokens.
            seed, indices: Decide between regions with equal scores.

        Returns:
            Regions, shape (B, rows, columns), boolean; pictures, shape (B, H, W, 3), if there is a VAE.
        """
        pictures = None if self.vae is None else self._decoded(self.vae, model, clean)
        if pictures is None or self.method == "latent gradient":
            scores = gradient_scores(clean.float().cpu(), grid)
        else:
            scores = edge_scores(pictures, grid, bright_half_only=self.method != "edges")
        forced = None if self.mask is None else _for_batch(masked_tokens(_on_cpu(self.mask), grid), len(scores))
        return choose_regions(scores, self.ratio, forced, seeded_noise(scores.shape, seed, 0, indices)), pictures

    @staticmethod
    def _decoded(vae: Any, model: Any, clean: Tensor) -> Tensor:
        latent = model.process_latent_out(with_frames(model, clean).float())
        pictures = vae.decode(latent.to(comfy.model_management.intermediate_device()))
        return pictures.reshape(-1, *pictures.shape[-3:]).float().cpu()  # a video's frames are a batch


def _on_cpu(mask: Tensor) -> Tensor:
    """Return masks on the scores' device, shape (B, H, W)."""
    return mask.cpu().reshape(-1, *mask.shape[-2:])


def _for_batch(flags: Tensor, batch: int) -> Tensor:
    """Return one mask per picture; fewer masks than pictures repeat, as in the host."""
    return flags if len(flags) == 1 else flags[torch.arange(batch) % len(flags)]

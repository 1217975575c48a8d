"""Probe pictures for choosing blocks (DiT-BlockSkip, arXiv 2603.20755, Eq. 2), sampled with Euler's method.

Difference from the paper: it compares DINO or CLIP embeddings of pictures made with 30 fine-tuned models; here latents of the
plain model are compared, unless ``embed`` makes something else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.timesteps import shift_sigma
from ...model import Denoiser
from .diffusers_dit import DiffusersDit
from .text_masking import masked_blocks


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How probe pictures are sampled.

    Attributes:
        rows, columns: Size of the latents in cells.
        num_steps: Steps per picture.
        shift: Shift of the noise levels; see ``noise_shift``.
        seed: Of the noise, which is the same for all captions.
        negative: Index of the caption that guidance leads away from; None for models without guidance.
        guidance: Strength of the guidance.
    """

    rows: int
    columns: int
    num_steps: int = 8
    shift: float = 3.0
    seed: int = 0
    negative: int | None = None
    guidance: float = 4.5


class ProbeLatents:
    """Latents sampled from some captions: a :class:`~...selection.text_influence.ProbeSampler`.

    Args:
        dit: The model.
        captions: Indices of the captions to sample.
        settings: How to.
        embed: Latent (1, C, H, W) -> what is compared.
    """

    def __init__(
        self,
        dit: DiffusersDit,
        captions: Sequence[int],
        settings: ProbeSettings,
        embed: Callable[[Tensor], Tensor] = lambda latent: latent,
    ) -> None:
        self._dit, self._captions, self._settings, self._embed = dit, captions, settings, embed
        self.steps = len(captions) * settings.num_steps

    @torch.no_grad()
    def embeddings(self, masked: frozenset[int], on_step: Callable[[], None]) -> list[Tensor]:
        """Sample every caption from the same noise, with the text hidden from some blocks."""
        with self._dit.running(masked_blocks(self._dit, masked)) as denoise:
            return [self._embed(self._sampled(denoise, caption, on_step)) for caption in self._captions]

    def _sampled(self, denoise: Denoiser, caption: int, on_step: Callable[[], None]) -> Tensor:
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (1, self._dit.layout.channels(self._dit.model.config), settings.rows, settings.columns)
        latent = torch.randn(shape, generator=generator).to(self._dit.device)
        sigmas = shift_sigma(torch.linspace(1.0, 0.0, settings.num_steps + 1), settings.shift)
        for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
            clean = self._clean(denoise, latent, sigma, caption)
            latent = clean + following / sigma * (latent - clean)
            on_step()
        return latent.cpu()

    def _clean(self, denoise: Denoiser, latent: Tensor, sigma: float, caption: int) -> Tensor:
        """Return the clean estimate, with guidance."""
        sigmas = torch.full((1,), sigma, device=latent.device)
        clean = denoise(latent, sigmas, [caption])
        if self._settings.negative is None:
            return clean
        away = denoise(latent, sigmas, [self._settings.negative])
        return away + self._settings.guidance * (clean - away)

"""Pictures while a word is learned: prompts with the word so far, through the host's own Euler.

They are sampled from the model as the losses use it, in any format and of any kind, U-Nets included. Text encoder and model
are those that are loaded already; the prompts are encoded first, so they can take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ...errors import InvalidInputError
from ..inputs.frames import latent_channels, with_frames
from ..sampling.training_samples import SampleRequest, decoded
from .captions import WordCaptions
from .losses import WordLosses


class WordSampler:
    """Samples pictures of prompts with a word; call it inside :meth:`WordLosses.loaded`.

    Args:
        losses: Of the run; its model and text encoders are used.
        prompts: The prompts, with the word in each.
        request: Size, sampler and schedule. Of its own prompts only the guidance of the first is used, because the word is
            not in them; without one the model's default is.
        texts: The prompts encoded with the word at the start, each ``[[tensor, settings]]``; they name the samples.

    Attributes:
        request: The request, with these texts and that guidance.

    Raises:
        InvalidInputError: If there are too many prompts, or the model's latents cannot have that size.
    """

    def __init__(
        self, losses: WordLosses, prompts: WordCaptions, request: SampleRequest, texts: Sequence[list]
    ) -> None:
        self._losses, self._prompts = losses, prompts
        if request.width % losses.cell or request.height % losses.cell:
            raise InvalidInputError(
                f"width and height must be multiples of {losses.cell} px for this model, got {request.width} and "
                f"{request.height}."
            )
        self._settings = _guidance(request)
        positive = [[[text, {**settings, **self._settings}]] for [[text, settings]] in texts]
        self.request = replace(request, positive=positive)

    @torch.no_grad()
    def pictures(self, word: Tensor, *, on_step: Callable[[int, int], None]) -> list[Tensor]:
        """Return one picture per prompt, each (H, W, 3) in [0, 1], on the CPU.

        Args:
            word: The word, shape (numbers,).
            on_step: Called after every sampler step with (done, total); may raise to interrupt.
        """
        prompts, steps = self._losses.prompts(self._prompts, word, self._settings), self.request.steps

        def made(before: int, done: int) -> None:
            on_step(before + done, len(prompts) * steps)

        with self._losses.set_aside() as patcher:
            return [
                self._picture(patcher, prompt, partial(made, number * steps)) for number, prompt in enumerate(prompts)
            ]

    def _picture(self, patcher: Any, prompt: list, on_step: Callable[[int], None]) -> Tensor:
        request, model = self.request, patcher.model
        cell = self._losses.cell
        shape = (1, latent_channels(model), request.height // cell, request.width // cell)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
        latent = comfy.sample.sample(
            patcher, with_frames(model, noise), request.steps, request.cfg, "euler", request.scheduler, prompt,
            request.negative or prompt, with_frames(model, torch.zeros(shape)), seed=request.seed, disable_pbar=True,
            callback=lambda step, *_: on_step(step + 1),
        )  # fmt: skip
        return decoded(request.vae, latent)


def _guidance(request: SampleRequest) -> dict[str, Any]:
    """Return the guidance of a request's first prompt by its name in a CONDITIONING, or nothing."""
    [[_, settings]] = request.positive[0]
    return {"guidance": settings["guidance"]} if "guidance" in settings else {}

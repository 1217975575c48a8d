"""What learning a word needs, counted before it starts: one step of the real loop, on twins without weights.

Text encoders and model are counted one after the other, as they run; whether their weights are loaded at the same time is
then a sum or a maximum. See ``accounting.measuring`` for what is counted and what is not. The VAE is not: it is gone
before the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...accounting.fused_kernels import FusedAttention
from ...accounting.measuring import Counting
from ...accounting.weight_formats import stored_bytes
from ...zoodip.examples import Example
from ...zoodip.word import WordLayout
from ..models.weightless_dit import torch_attention, weightless_model, weightless_module
from .captions import WordCaptions
from .losses import WordLosses

META = torch.device("meta")
_EXAMPLE = Example(picture=0, mirrored=False, level=0.5, noise_seed=0)


@dataclass(frozen=True, kw_only=True)
class WordNeeds:
    """Bytes on the device.

    Attributes:
        text_weights, text_peak: The text encoders' weights, and the most that encoding a prompt needs on top; 0 if they
            run elsewhere.
        model_weights, model_peak: Likewise for the model, with all words of a step as one batch.
    """

    text_weights: int
    text_peak: int
    model_weights: int
    model_peak: int

    @property
    def together(self) -> int:
        """With both loaded."""
        return self.text_weights + self.model_weights + max(self.text_peak, self.model_peak)

    @property
    def in_turns(self) -> int:
        """With one loaded at a time."""
        return max(self.text_weights + self.text_peak, self.model_weights + self.model_peak)


def word_needs(
    model: Any, captions: WordCaptions, layout: WordLayout, latent_shape: Sequence[int], rows: int, *, guidance: float = 1.0
) -> WordNeeds:  # fmt: skip
    """Count a step.

    Args:
        model: The MODEL; nothing of it is loaded.
        captions: The captions; the longest one counts.
        layout: The word's shape.
        latent_shape: (C, H, W).
        rows: Words of a step.
        guidance: See :class:`WordLosses`.
    """
    counting, words = Counting(), torch.zeros(rows, layout.numbers)
    losses = _CountedLosses(model, captions, layout, latent_shape, guidance, counting)
    with counting, torch.no_grad():
        with losses.loaded(rows):
            for caption in range(len(captions)):
                losses.count(words[:1], caption)
            losses(words, _EXAMPLE)
    text, elsewhere = captions.clip, captions.clip.patcher.load_device != model.load_device
    return WordNeeds(
        text_weights=0 if elsewhere else _weights(text.cond_stage_model),
        text_peak=0 if elsewhere else losses.text_peak,
        model_weights=_weights(model.model), model_peak=losses.model_peak,
    )  # fmt: skip


class _CountedLosses(WordLosses):
    """The losses of words, on twins without weights.

    Attributes:
        text_peak, model_peak: See :class:`WordNeeds`.
    """

    def __init__(
        self, model: Any, captions: WordCaptions, layout: WordLayout, latent_shape: Sequence[int], guidance: float,
        counting: Counting,
    ) -> None:  # fmt: skip
        own = copy.copy(captions)
        own.clip = _weightless_clip(captions.clip)
        twin = _Weightless(weightless_model(model), load_device=META, offload_device=META)
        twin.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
        pictures = len(captions)
        super().__init__(
            twin, own, layout, torch.zeros(pictures, *latent_shape), pictures, guidance=guidance, residency="together"
        )
        self.text_peak = self.model_peak = 0
        self._counting = counting

    def count(self, words: Tensor, caption: int) -> None:
        """Count the prompts of a caption."""
        self._encoded(words, caption)

    def _encoded(self, words: Tensor, caption: int) -> list[list]:
        with self._peak() as peak, FusedAttention():
            encoded = super()._encoded(words, caption)
        self.text_peak = max(self.text_peak, peak[0])
        return encoded

    def _evaluated(self, conditionings: Sequence[list], example: Example) -> Tensor:
        with self._peak() as peak:
            losses = super()._evaluated(conditionings, example)
        self.model_peak = max(self.model_peak, peak[0])
        return losses

    def _load(self, *patchers: Any) -> None:
        """Load nothing: there are no weights."""

    @contextmanager
    def _peak(self) -> Iterator[list[int]]:
        """Give the most bytes alive at one time, at the end."""
        self._counting.reset_peak()
        found = [0]
        yield found
        found[0] = self._counting.peak(META)


class _Weightless(comfy.model_patcher.ModelPatcher):
    """A patcher of a twin without weights: the whole batch fits."""

    def get_free_memory(self, device: torch.device) -> int:
        """Return more than anything needs."""
        return 2**60


def _weightless_clip(clip: Any) -> Any:
    """Return a clone of a CLIP without weights; the CLIP is left unchanged."""
    twin = clip.clone()
    twin.cond_stage_model = weightless_module(clip.cond_stage_model)
    twin.patcher = _Weightless(twin.cond_stage_model, load_device=META, offload_device=META)
    return twin


def _weights(module: torch.nn.Module) -> int:
    """Return the bytes of a module's tensors as stored, each once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(stored_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())

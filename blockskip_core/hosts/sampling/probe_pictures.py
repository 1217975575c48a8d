"""Probe pictures for block selection: sampled with image-to-text attention masked in some blocks, then compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import torch
from torch import Tensor

from ...errors import InvalidInputError, UnsupportedModelError
from ..families.capabilities import MasksText, require
from ..families.followed import FollowedAdapter
from ..families.registry import adapter_for
from ..inputs.frames import latent_shape, with_frames
from ..models.hosted_dit import HostedDit
from ..models.replay_check import TOLERANCE
from .picture_embeddings import embedded, encoder_kind, require_vectors
from .start_noise import start_noise

_WRAPPER = "blockskip_text_mask"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How probe pictures are sampled. The paper gives none of this; the defaults are ours.

    Attributes:
        size: Side in pixels.
        steps: Sampler steps (Euler).
        cfg: Guidance scale; 1 for guidance-distilled models.
        seed: Seed of the first picture's noise; the next pictures count up.
        num_seeds: Number of pictures per prompt.

    Raises:
        InvalidInputError: If a count or the guidance is less than 1, or the size is not a multiple of 16.
    """

    size: int = 512
    steps: int = 8
    cfg: float = 1.0
    seed: int = 0
    num_seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "num_seeds"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 1.0 <= self.cfg < float("inf"):
            raise InvalidInputError(f"cfg must be at least 1, got {self.cfg}.")
        if self.size < 16 or self.size % 16:
            raise InvalidInputError(f"The probe size must be a positive multiple of 16 px, got {self.size}.")


class MaskedSampler:
    """Samples latents from a MODEL in which some blocks' image tokens cannot see the text.

    Args:
        patcher: The MODEL; only clones of it are sampled from, and it is not changed.
        probe: Size, steps, guidance.
        texts: Some of the conditionings, with which a model that no family file describes is followed.

    Raises:
        UnsupportedModelError: If the text cannot be hidden from the model's blocks.
    """

    def __init__(self, patcher: Any, probe: ProbeConfig, texts: Sequence[list] = ()) -> None:
        self._patcher = patcher
        self._probe = probe
        self._adapter = adapter_for(patcher)
        if isinstance(self._adapter, FollowedAdapter):
            self._adapter = HostedDit(patcher, texts, latent_shape(patcher.model, probe.size)).adapter
        self._masking = require(self._adapter, MasksText, "Choose method preset or manual.")
        self._masking.text_masking_wrapper(frozenset())  # refuses what it cannot do before anything is sampled

    def sample(
        self,
        positive: list,
        negative: list,
        *,
        seed: int,
        masked: frozenset[int],
        on_step: Callable[[], None] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Return one picture's latent as a VAE decodes it, (1, C, H, W), or (1, C, 1, H, W) for video models.

        Args:
            positive, negative: CONDITIONINGs.
            seed: Seed of the noise.
            masked: Indices of the masked blocks; if empty, the plain MODEL is sampled.
            on_step: Called after every sampler step; may raise to interrupt.
            steps: Sampler steps, if not those of the probe.
        """
        patcher = self._patcher
        if masked:
            patcher = patcher.clone()
            patcher.add_wrapper_with_key(
                comfy.patcher_extension.WrappersMP.APPLY_MODEL,
                _WRAPPER,
                self._masking.text_masking_wrapper(masked),
            )
        model = self._patcher.model
        empty = with_frames(model, torch.zeros(1, *latent_shape(model, self._probe.size)))
        return comfy.sample.sample(
            patcher,
            start_noise(empty, seed),
            steps or self._probe.steps,
            self._probe.cfg,
            "euler",
            "simple",
            positive,
            negative,
            empty,
            callback=lambda *_: on_step() if on_step else None,
            disable_pbar=True,
            seed=seed,
        )

    def require_hidden(self, text: list) -> None:
        """Check, if the model was followed, that no word of a text matters when it is hidden from all blocks.

        Raises:
            UnsupportedModelError: If the text reaches the picture by another way.
        """
        if not isinstance(self._adapter, FollowedAdapter):
            return
        everywhere = frozenset(range(len(self._adapter.blocks())))
        one, other = (
            self.sample(words, words, seed=0, masked=everywhere, steps=1) for words in (text, _other_words(text))
        )  # fmt: skip
        if not (one - other).norm() <= TOLERANCE * one.norm():
            raise UnsupportedModelError(
                f"In {self._adapter.title} models the text reaches the picture even if it is hidden from all blocks, so its "
                "influence in each block cannot be measured. Choose method preset or manual."
            )


def _other_words(text: list) -> list:
    """Return a conditioning with other vectors for its tokens, and everything else as it is."""
    [[embedding, settings]] = text
    return [[_changed(embedding), {name: _changed(value) for name, value in settings.items()}]]


def _changed(value: Any) -> Any:
    is_text = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3
    return value.flip(-1) if is_text else value


@dataclass(frozen=True)
class PictureMetric:
    """How two pictures are compared.

    Attributes:
        name: Name shown to users.
        embed: Latent, as returned by a sampler -> vector.
    """

    name: str
    embed: Callable[[Tensor], Tensor]


class ProbePictures:
    """The probe pictures of some prompts, embedded: a :class:`~...selection.text_influence.ProbeSampler`.

    Args:
        patcher: The MODEL; left unchanged.
        positive: Single conditionings, each ``[[tensor, settings]]``.
        negative: One such conditioning, or None; used with guidance only.
        probe: Size, steps, guidance, pictures per prompt.
        metric: How pictures are compared.

    Raises:
        InvalidInputError: If a conditioning comes from another model's text encoder.
    """

    def __init__(
        self, patcher: Any, positive: Sequence[list], negative: list | None, probe: ProbeConfig, metric: PictureMetric
    ) -> None:
        texts = [*positive, *([negative] if negative else [])]
        adapter_for(patcher).require_texts(texts)
        self._positive, self._negative, self._probe, self._metric = positive, negative, probe, metric
        self._sampler = MaskedSampler(patcher, probe, texts)
        self.count = len(positive) * probe.num_seeds
        self.steps = self.count * probe.steps

    def require_hidden_text(self) -> None:
        """See :meth:`MaskedSampler.require_hidden`."""
        self._sampler.require_hidden(self._positive[0])

    def embeddings(self, masked: frozenset[int], on_step: Callable[[], None]) -> list[Tensor]:
        """Sample and embed every picture."""
        return [self._embedding(prompt, number, masked, on_step)
                for prompt in self._positive for number in range(self._probe.num_seeds)]  # fmt: skip

    def _embedding(self, prompt: list, number: int, masked: frozenset[int], on_step: Callable[[], None]) -> Tensor:
        seed = (self._probe.seed + number) % 2**64
        latent = self._sampler.sample(prompt, self._negative or prompt, seed=seed, masked=masked, on_step=on_step)
        return self._metric.embed(latent)


def require_negative(cfg: float, has_negative: bool) -> None:
    """Raise InvalidInputError for guidance without a negative prompt, which would cancel."""
    if cfg > 1.0 and not has_negative:
        raise InvalidInputError(
            f"`probe_cfg` is {cfg:g} and needs a `negative`. Connect CLIP Text Encode with an empty text, or set it to 1."
        )


def picture_metric(vae: Any | None, clip_vision: Any | None) -> PictureMetric:
    """Return the paper's metric (a vision encoder's embedding) if both are given, else one on the latents themselves.

    The paper compares DINO or CLIP embeddings; ComfyUI's CLIP Vision loader reads CLIP-ViT and DINOv2.
    """
    if vae is None or clip_vision is None:
        return PictureMetric("latents", lambda latent: latent)
    require_vectors(clip_vision)

    def embed(latent: Tensor) -> Tensor:
        decoded = vae.decode(latent)
        return embedded(clip_vision, decoded.reshape(-1, *decoded.shape[-3:]))  # a video's frames are a batch

    return PictureMetric(f"{encoder_kind(clip_vision)} embedding", embed)

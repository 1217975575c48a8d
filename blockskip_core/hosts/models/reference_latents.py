"""Reference pictures of edit models: encoded, and put into captions as the host's ReferenceLatent does.

A reference is part of its caption, as everywhere in the host: the model's own ``extra_conds`` scales its latent, and
the model appends its tokens to the picture's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...data.crops import TrainingCrops
from ...data.reference_pictures import AlignedReferences, ReferenceSettings, WholeReferences, shown_size
from ...data.schedule import TrainingSchedule
from ...errors import InvalidInputError, UnsupportedModelError
from ...residuals.residual_set import PhaseProgress
from ..families.base import FamilyAdapter
from ..inputs.conditioning import REFERENCES, references_of
from ..inputs.encoding import encode_one
from ..inputs.frames import has_frames, latent_channels
from ..inputs.references import References


def require_takes_references(adapter: FamilyAdapter) -> None:
    """Check that the models of a family take reference pictures.

    Raises:
        UnsupportedModelError: If not.
    """
    if not adapter.takes_references:
        raise UnsupportedModelError(
            f"Reference pictures are not supported for {adapter.title} models. Disconnect them, or load an edit model "
            "such as FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit."
        )


def require_references(adapter: FamilyAdapter, model: Any, captions: Sequence[list]) -> None:
    """Check that a model takes the reference latents that captions carry, and that they are of its VAE.

    Raises:
        UnsupportedModelError: If the family takes none.
        InvalidInputError: If they are of another VAE.
    """
    latents = [latent for caption in captions for latent in references_of(caption)]
    if latents:
        require_takes_references(adapter)
    channels, axes = latent_channels(model), 5 if has_frames(model) else 4
    for latent in latents:
        if latent.shape[1] != channels or latent.ndim != axes:
            raise InvalidInputError(
                f"The model reads reference latents of {channels} channels and {axes} axes, got the shape "
                f"{tuple(latent.shape)}. Encode them with the VAE that belongs to the model."
            )


def require_references_read(
    adapter: FamilyAdapter, captions: Sequence[list], arguments: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the references of captions are among the arguments of the model.

    Raises:
        UnsupportedModelError: If the host drops them.
    """
    for caption, given in zip(captions, arguments, strict=True):
        if references_of(caption) and not adapter.references_among(given):
            raise UnsupportedModelError(
                f"This version of ComfyUI passes no reference pictures to {adapter.title} models. Update ComfyUI, or "
                "disconnect them."
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceEncoder:
    """Encodes the references of a training, and puts them into its captions.

    Attributes:
        references: The references.
        sizes: Height and width in pixels of the training pictures.
        vae: The VAE.
        model: The host's model that it belongs to.
        multiple: Number of pixels that the sides of references are multiples of.
        progress: Called during the work; may raise to interrupt.
    """

    references: References
    sizes: Sequence[tuple[int, int]]
    vae: Any
    model: Any
    multiple: int
    progress: PhaseProgress

    def captions(self, texts: Sequence[list], schedule: TrainingSchedule) -> tuple[list[list], TrainingSchedule]:
        """Return captions that carry their references, and the schedule with its draws referring to them.

        Args:
            texts: Single conditionings: one for all training pictures, or one for each.
            schedule: The draws, referring to the texts.

        Raises:
            InvalidInputError: If the VAE does not fit the model, or a reference has not the shape that it must have.
        """
        if self.references.settings.part == "same part":
            return self._of_draws(texts, schedule)
        return self._of_pictures(texts, schedule)

    def _of_pictures(self, texts: Sequence[list], schedule: TrainingSchedule) -> tuple[list[list], TrainingSchedule]:
        """Encode every reference once; every training picture gets a caption, unless all share one."""
        shown = WholeReferences(self.references.pictures, self.references.settings.size, self.multiple)
        latents = [self._latent(shown, index, index, len(shown)) for index in range(len(shown))]
        if not self.references.each and len(texts) == 1:
            return [_carrying(texts[0], latents)], schedule
        carrying = [
            _carrying(
                texts[picture if len(texts) > 1 else 0], [latents[index] for index in self.references.of(picture)]
            )
            for picture in range(len(self.sizes))
        ]
        return carrying, _referring(schedule, [draw.picture for draw in schedule])

    def _of_draws(self, texts: Sequence[list], schedule: TrainingSchedule) -> tuple[list[list], TrainingSchedule]:
        """Encode the crop of every draw; every draw gets a caption, which shares the tensors of its text."""
        crops = self._crops(schedule)
        latents: dict[int, list[Tensor]] = {}
        for index in crops[0].by_picture(range(len(schedule))):
            latents[index] = [self._latent(of_one, index, len(latents), len(schedule)) for of_one in crops]
        carrying = [_carrying(texts[draw.caption], latents[index]) for index, draw in enumerate(schedule)]
        return carrying, _referring(schedule, range(len(schedule)))

    def _crops(self, schedule: TrainingSchedule) -> list[TrainingCrops]:
        """Return the crops of the first reference of every training picture, of the second, and so on."""
        pictures, crops = self.references.pictures, []
        for number in range(max(1, self.references.each)):
            column = [self.references.of(picture)[number] for picture in range(len(self.sizes))]
            crops.append(TrainingCrops(AlignedReferences(pictures, column, self.sizes, pictures.labels), schedule))
        return crops

    def _latent(self, shown: Sequence[Tensor], index: int, done: int, total: int) -> Tensor:
        latent = encode_one(self.vae, self.model, shown[index]).float().cpu()
        if not torch.isfinite(latent).all():
            raise InvalidInputError("The VAE made reference latents with NaN or Inf. Load it in fp32 or bf16.")
        self.progress("encoding references", done + 1, total)
        return latent


def counted_captions(
    adapter: FamilyAdapter,
    model: Any,
    captions: Sequence[list],
    sizes: Sequence[tuple[int, int]],
    each: int,
    settings: ReferenceSettings,
    patch_min: int,
) -> list[list]:
    """Return captions that carry latents of the right shapes, all zeros, for counting a run without a VAE.

    Args:
        adapter: The adapter of the model's family.
        model: The host's model.
        captions: Single conditionings.
        sizes: Height and width in pixels of all references; the largest count.
        each: Number of references of each picture.
        settings: How references are shown.
        patch_min: Side in pixels of a training picture.
    """
    require_takes_references(adapter)
    form = model.latent_format
    cell, frame = form.spacial_downscale_ratio, (1,) * has_frames(model)
    multiple = cell * adapter.patch_size
    shown = [shown_size(height, width, settings.size, multiple) for height, width in sizes]
    if settings.part == "same part":
        shown = [(patch_min, patch_min)] * len(sizes)
    largest = sorted(shown, key=math.prod)[-each:]
    latents = [
        torch.zeros(1, latent_channels(model), *frame, rows // cell, columns // cell) for rows, columns in largest
    ]
    return [_carrying(caption, latents) for caption in captions]


def _carrying(caption: list, latents: Sequence[Tensor]) -> list:
    [[embedding, settings]] = caption
    return [[embedding, {**settings, REFERENCES: list(latents)}]]


def _referring(schedule: TrainingSchedule, captions: Sequence[int]) -> TrainingSchedule:
    """Return the schedule with other captions for its draws."""
    draws = (replace(draw, caption=caption) for draw, caption in zip(schedule, captions, strict=True))
    return replace(schedule, draws=tuple(draws))

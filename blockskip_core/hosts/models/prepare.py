"""Turn pictures, captions and a MODEL into the inputs of a training: schedule, latents and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...data.buckets import PatchShape
from ...data.crops import TrainingCrops
from ...data.latents import Latents, largest_shape, without_values
from ...data.patch_sampling import PatchConfig, PatchOrder
from ...data.remarks import Labels
from ...data.schedule import Draw, TrainingSchedule, draw_schedule
from ...data.timesteps import TimestepDistribution, sigma_sampler
from ...errors import InvalidInputError
from ...residuals.back_response import BackResidual, how_fitted
from ...residuals.cache import CacheIdentity
from ...residuals.cached_set import stored_latents, write_cache
from ...residuals.format import RESIDUAL_FORMATS, ResidualFormat
from ...residuals.residual_set import PhaseProgress, ResidualSet, Storage, require_room
from ...selection.selection import BlockSelection
from ..files.folders import residuals_folder
from ..inputs.empty_captions import require_empty_caption, with_empty_captions
from ..inputs.encoding import crop_multiple, encode_crops
from ..inputs.frames import latent_shape
from ..inputs.given_latents import LatentRows, WholeLatents
from ..inputs.references import References
from .adapted_dit import frames_of_clip
from .hosted_dit import HostedDit
from .identity import captions_identity, host_identity, model_identity, module_identity, tensors_identity
from .patches import for_training
from .reference_latents import ReferenceEncoder, require_takes_references


@dataclass(frozen=True, kw_only=True)
class ResidualSettings:
    """How examples are drawn and how their residuals are stored.

    Attributes:
        draws: Number of training examples.
        patch_min, patch_max: Sides in pixels of a training picture, and of the largest crop.
        storage: Where residuals are kept.
        seed: Determines every random decision.
        patch_order: How a crop's side depends on its noise level.
        timesteps: Distribution of noise levels; ``timestep_shift`` is used by "shifted" only.
        chunk_size: Number of examples that go through the model's blocks together.
        back_residual: What replaces the last blocks.
        residual_format: How residuals are rounded.
        frames: Number of pictures of a clip; 1 for pictures.
        noise_from, noise_to: Noise levels are drawn from within this range.
        caption_dropout: Share of the examples that get the empty caption in place of their own.
        patch_shape: Whether training pictures are squares, or as their pictures; see ``buckets``.
    """

    draws: int
    patch_min: int
    patch_max: int
    storage: Storage
    seed: int
    patch_order: PatchOrder = "low-to-high"
    timesteps: TimestepDistribution = "model"
    timestep_shift: float = 3.0
    chunk_size: int = 64
    back_residual: BackResidual = "exact"
    residual_format: ResidualFormat = "exact"
    frames: int = 1
    noise_from: float = 0.0
    noise_to: float = 1.0
    caption_dropout: float = 0.0
    patch_shape: PatchShape = "square"

    def as_read(self) -> ResidualSettings:
        """Return the settings, with those that this storage ignores at their defaults, so that runs are found again."""
        if self.storage != "on the fly":
            return self
        return replace(
            self,
            back_residual="constant" if self.back_residual == "linear" else self.back_residual,
            residual_format="exact" if self.residual_format in RESIDUAL_FORMATS else self.residual_format,
        )


def prepare_residuals(
    model: Any,
    vae: Any,
    pictures: Sequence[Tensor] | LatentRows,
    captions: Sequence[list],
    selection: BlockSelection,
    settings: ResidualSettings,
    progress: PhaseProgress,
    labels: Labels | None = None,
    references: References | None = None,
    empty_caption: list | None = None,
    planned: bool = False,
) -> tuple[ResidualSet, TrainingCrops]:
    """Draw the schedule, encode its crops and, with storage "disk", compute the residuals unless they are stored.

    Args:
        model: The MODEL.
        vae: The VAE that belongs to it.
        pictures: Each (H, W, 3) in [0, 1]; with ``frames``, clips of these with a first axis, or of one picture.
            Or latents of whole pictures or clips.
        captions: Single conditionings, each ``[[tensor, settings]]``: one for all pictures or one for each.
        selection: Blocks to be skipped.
        settings: How examples are drawn and stored.
        progress: Called during the work; may raise to interrupt.
        labels: The pictures' names in messages; their numbers if None.
        references: Pictures that an edit model sees beside the captions, or None.
        empty_caption: A single conditioning for ``caption_dropout``, or None.
        planned: Whether ``patch_min`` is what a plan for the memory has counted with.

    Raises:
        UnsupportedModelError: If the model takes no references.
        InvalidInputError: If inputs do not fit together, or there is not enough space.
        StorageError: If the disk cannot be written.
    """
    require_empty_caption(empty_caption, settings.caption_dropout)
    settings, model = settings.as_read(), for_training(model)
    is_encoded = isinstance(pictures, LatentRows)
    shape = latent_shape(model.model, settings.patch_min, frames_of_clip(model, 1 if is_encoded else settings.frames))
    bare = HostedDit(model, captions, shape)
    selection.require_for(len(bare.blocks), bare.family)
    if settings.back_residual == "exact":
        selection = selection.with_exact_back()
    multiple = crop_multiple(vae, bare.adapter.patch_size)
    if isinstance(pictures, LatentRows):
        pictures = WholeLatents(pictures, vae, model.model, bare.adapter.patch_size)
        side = pictures.square(multiple)
        if planned and side != settings.patch_min:
            raise InvalidInputError(
                f"The latents are as large as pictures of {side} px, and Memory Plan counted {settings.patch_min} px. Set "
                f"`patch_min` on Memory Plan to {side}; if the plan lowers it, encode smaller latents."
            )
        settings = replace(settings, patch_min=side, patch_max=side, patch_order="fixed")
    schedule = _schedule(model, pictures, len(captions), multiple, settings, labels)
    crops = TrainingCrops(pictures, schedule)
    if references is not None:
        require_takes_references(bare.adapter)
        encoder = ReferenceEncoder(
            references=references, sizes=_sizes(pictures), vae=vae, model=model.model, multiple=multiple, progress=progress,
        )  # fmt: skip
        captions, schedule = encoder.captions(captions, schedule)
    captions, schedule, dropped = with_empty_captions(captions, schedule, empty_caption, settings.caption_dropout)
    identity = _identity(bare, vae, pictures, captions, selection, schedule, settings)
    residuals = ResidualSet(
        schedule=schedule,
        latents=_latents_to_be(model, pictures, schedule),
        selection=selection,
        captions=captions,
        identity=identity,
        storage=settings.storage,
        chunk_size=settings.chunk_size,
        folder=residuals_folder(identity.key),
        family=bare.family,
        back_residual=settings.back_residual,
        dropped=dropped,
    )
    residuals = replace(residuals, latents=_latents(model, vae, pictures, crops, residuals, progress))
    if residuals.storage == "disk" and not write_cache(residuals, _dit(model, residuals), progress):
        # Another process may have been faster. Its device may round differently, so its cache needs its latents.
        stored = stored_latents(residuals, progress)
        residuals = residuals if stored is None else replace(residuals, latents=stored)
    return residuals, crops


def _dit(model: Any, residuals: ResidualSet) -> HostedDit:
    return HostedDit(model, residuals.captions, largest_shape(residuals.latents))


def _sizes(pictures: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return height and width of each in pixels."""
    if isinstance(pictures, WholeLatents):
        return pictures.sizes
    return [(picture.shape[-3], picture.shape[-2]) for picture in pictures]


def _latents_to_be(model: Any, pictures: Sequence[Tensor], schedule: TrainingSchedule) -> Latents:
    """Return latents without values of the shapes that the draws' will have."""
    if isinstance(pictures, WholeLatents):
        frames = [row.shape[2] if row.ndim == 5 else 1 for row in pictures.rows]
    else:
        frames = [frames_of_clip(model, len(picture) if picture.ndim == 4 else 1) for picture in pictures]

    def shape(draw: Draw) -> tuple[int, int, int]:
        height, width = schedule.size_of(draw.picture)
        channels, rows, _ = latent_shape(model.model, height, frames[draw.picture])
        return channels, rows, latent_shape(model.model, width)[2]

    return without_values(map(shape, schedule))


def _schedule(
    model: Any,
    pictures: Sequence[Tensor],
    num_captions: int,
    multiple: int,
    settings: ResidualSettings,
    labels: Labels | None,
) -> TrainingSchedule:
    sampling = model.get_model_object("model_sampling")
    return draw_schedule(
        _sizes(pictures),
        num_captions=num_captions,
        num_draws=settings.draws,
        patches=PatchConfig(
            patch_min=settings.patch_min, patch_max=settings.patch_max, multiple=multiple, order=settings.patch_order
        ),
        sample_sigmas=sigma_sampler(
            settings.timesteps,
            model_sigma=lambda time: float(sampling.percent_to_sigma(1.0 - time)),
            shift=settings.timestep_shift,
            within=(settings.noise_from, settings.noise_to),
        ),
        seed=settings.seed,
        timesteps=settings.timesteps,
        labels=labels,
        shape=pictures.sizes if isinstance(pictures, WholeLatents) else settings.patch_shape,
    )


def _identity(
    dit: HostedDit,
    vae: Any,
    pictures: Sequence[Tensor],
    captions: Sequence[list],
    selection: BlockSelection,
    schedule: TrainingSchedule,
    settings: ResidualSettings,
) -> CacheIdentity:
    """Return everything that determines the residuals' values."""
    linear = settings.back_residual == "linear" and selection.back > 0
    return CacheIdentity(
        model=model_identity(dit.patcher),
        schedule=schedule.fingerprint,
        selection=selection.fingerprint,
        pictures=tensors_identity(pictures.rows if isinstance(pictures, WholeLatents) else pictures)
        + module_identity(vae.first_stage_model),
        captions=captions_identity(captions),
        dtype=str(dit.dtype),
        host=host_identity(),
        residual_format=settings.residual_format,
        back_residual=how_fitted(len(schedule)) if linear else "constant",  # an exact back has none
    )


def _latents(
    model: Any,
    vae: Any,
    pictures: Sequence[Tensor],
    crops: TrainingCrops,
    residuals: ResidualSet,
    progress: PhaseProgress,
) -> Latents:
    """Return the latents of all crops, from a finished cache or encoded now, if there is space for the residuals."""
    if residuals.storage == "disk":
        stored = stored_latents(residuals, progress)
        if stored is not None:
            return stored
    require_room(residuals, _dit(model, residuals))  # before spending an hour on encoding
    if isinstance(pictures, WholeLatents):
        return pictures.of_draws([draw.picture for draw in residuals.schedule])
    return encode_crops(
        vae,
        model.model,
        crops,
        lambda done, total: progress("encoding crops", done, total),
        frames=partial(frames_of_clip, model),
        order=crops.by_picture(range(len(crops))),
        alike=crops.alike(),
    )

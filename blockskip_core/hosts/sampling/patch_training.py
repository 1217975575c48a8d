"""Train patch adapters on a loaded MODEL: its own latents, then one distillation per patch size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from ...adapters.lora import LoraSettings
from ...data.timesteps import require_noise_range
from ...ddit.coarse_estimate import CoarseAdapter
from ...ddit.coarse_levels import CoarseSteps
from ...ddit.connection import PatchStatistics
from ...ddit.error_table import ErrorTable
from ...ddit.patch_adapter import PatchAdapter
from ...ddit.patch_resizing import PatchResizing, ResizeKind
from ...ddit.trained_patches import ModelShape, TrainedPatches, TrainedScale
from ...distillation.examples import SMALLEST_SIGMA, Examples, levels_through, levels_within
from ...distillation.loop import DistillationResult, distill
from ...distillation.settings import DistillationSettings
from ...errors import InvalidInputError
from ...model import WeightPlacement
from ...training.checkpoints import KEPT_RUNS, Checkpoints, RunIdentity, remove_old_runs
from ...training.loss_scale import remark_on
from ...units import format_bytes
from ..files.folders import run_folder
from ..inputs.conditioning import flatten_conditionings
from ..inputs.middles import Middles, encoded_middles
from ..models.adapted_dit import frames_of_clip
from ..models.coarse_distillation import TrainedParts, distilling
from ..models.coarse_forward import require_clips, shape_of
from ..models.counted_calls import counted_operations
from ..models.counted_distillation import counted_distillation
from ..models.counted_run import UncountableError, counting, room_on
from ..models.hosted_dit import HostedDit
from ..models.identity import conditionings_identity, host_identity, model_identity, module_identity, tensors_identity
from ..models.patches import for_training
from .own_latents import OwnLatents, own_latents

logger = logging.getLogger(__name__)

# 1 had a teacher with what was trained; 2 lost gradients in float16, and those of the patches on MPS; 3 measured fewer captions
_VERSION = 4
_SCHEDULE = 100  # steps of the schedule through which training spreads over noise levels
_KEPT_STATES = 2
ALL_LEVELS = (0.0, 1.0)

# (phase, parts done, all parts, one line of detail); may raise to interrupt
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class PatchTraining:
    """What to train, and how.

    Attributes:
        scales: Patch sizes as multiples of the model's own, each at least 2.
        latents: What to train on.
        settings: Of each distillation.
        lora: Of the blocks; the paper trains feed-forward layers at rank 32.
        resize: How patches are reduced; see ``ddit.patch_resizing``.
        checkpointing: Recompute activations in backward.
        weights: Where the host keeps the weights.
        noise: Lowest and highest noise level to train on, for models that share the noise levels between them.
        coarse: Steps whose noise levels alone are trained on, and measured at; None for all levels.
        save_every: Steps between two saved states.
        resume: Whether to continue an interrupted training.

    Raises:
        InvalidInputError: If the scales or the noise levels cannot be used.
    """

    scales: tuple[int, ...]
    latents: OwnLatents
    settings: DistillationSettings
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=32, alpha=32.0, targets="mlp"))
    resize: ResizeKind = "nearest"
    checkpointing: bool = True
    weights: WeightPlacement = "as fits"
    save_every: int = 50
    resume: bool = True
    noise: tuple[float, float] = ALL_LEVELS
    coarse: CoarseSteps | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < 2 or len(set(self.scales)) != len(self.scales):
            raise InvalidInputError(f"Patch sizes must be different multiples of at least 2, got {self.scales}.")
        require_noise_range(*self.noise)


@dataclass(frozen=True)
class GivenPictures:
    """Pictures or clips to train on in the place of the model's own, one for each prompt.

    Attributes:
        pictures: Each (H, W, 3) in [0, 1], or a clip of as many of these as ``OwnLatents.frames`` says.
        vae: The model's VAE.
    """

    pictures: Sequence[Tensor]
    vae: Any


def train_patches(
    patcher: Any,
    positive: Sequence[Any],
    negative: Sequence[Any] | None,
    request: PatchTraining,
    progress: Progress,
    seen: Callable[[int, DistillationResult], None] = lambda scale, result: None,
    given: GivenPictures | None = None,
    told: Callable[[str], None] = lambda sentence: None,
    begun: Callable[[int, str], None] = lambda scale, key: None,
) -> TrainedPatches:
    """Return adapters for a MODEL, which is left unchanged.

    Args:
        patcher: The MODEL; what belongs to sampling only is left out.
        positive: CONDITIONINGs, at least two.
        negative: One CONDITIONING, for models that are sampled with guidance.
        request: See :class:`PatchTraining`.
        progress: Told of every sampler and training step, and of every call of a measurement.
        seen: Called with scale and result after every training step and before every measurement.
        given: Pictures to train on; None samples them.
        told: Called with a sentence on the memory that the training needs, before it, and on what went wrong, after it.
        begun: Called with scale and content hash of each size's training before its first step.

    Raises:
        InvalidInputError: If the prompts, the size or the coarse steps cannot be used.
        UnsupportedModelError: If the family is not known, or the MODEL has a change that training cannot follow.
        TrainingError: If a loss, gradient or held-out error is not finite, or a trained tensor gets no gradient.
    """
    run = _PatchTraining(patcher, positive, negative, request, given)
    run.count_memory(told)
    latents = run.latents(progress)
    scales = {scale: run.trained(scale, latents, progress, seen, begun, told) for scale in request.scales}
    return TrainedPatches(run.base, scales, run.operations, run.notes)


def counted_peak(patcher: Any, positive: Sequence[Any], negative: Sequence[Any] | None, request: PatchTraining) -> int:
    """Return the bytes that a training needs on the device: two steps of its smallest patches are counted without weights.

    Args:
        patcher, positive, negative, request: As for :func:`train_patches`; nothing is loaded.

    Raises:
        InvalidInputError: If the size cannot be used.
        UnsupportedModelError: If the family is not known, or the MODEL has a change that training cannot follow.
    """
    own = for_training(patcher)
    shape = _latent_shape(own, shape_of(own, identity=""), request, _latent_frames(own, request))
    captions = [*flatten_conditionings(positive), *(flatten_conditionings(negative)[:1] if negative else [])]
    return _counted(HostedDit(own, captions, shape), shape, request)[0]


def _counted(dit: HostedDit, shape: Sequence[int], request: PatchTraining) -> tuple[int, int]:
    """Return the bytes at the peak, and how many of them are not the model's weights."""
    count = counted_distillation(
        dit, shape, min(request.scales), request.lora, request.settings.batch_size,
        resize=request.resize, checkpointing=request.checkpointing,
    )  # fmt: skip
    return count.peak, count.peak - count.weights


class _PatchTraining:
    def __init__(
        self, patcher: Any, positive: Sequence[Any], negative: Sequence[Any] | None, request: PatchTraining,
        given: GivenPictures | None,
    ) -> None:  # fmt: skip
        prompts = flatten_conditionings(positive)
        against = flatten_conditionings(negative)[:1] if negative else []
        if given and len(given.pictures) != len(prompts):
            raise InvalidInputError(
                f"There must be one picture for each of the {len(prompts)} prompts, got {len(given.pictures)} pictures."
                if request.latents.frames == 1
                else f"There must be one clip for each of the {len(prompts)} prompts, got {len(given.pictures)} clips."
            )
        if request.latents.cfg != 1.0 and not against and not given:
            raise InvalidInputError(
                f"cfg is {request.latents.cfg}, but no negative came in. Connect `negative`, or set `cfg` to 1."
            )
        self._request, self._num_prompts, self._given = request, len(prompts), given
        self._per_prompt = 1 if given else request.latents.per_prompt
        self._negative = len(prompts) if against else None
        own = for_training(patcher).clone()
        identity = model_identity(own)
        self.base: ModelShape = shape_of(own, module_identity(own.model.diffusion_model))
        self._frames = _latent_frames(own, request)
        self._shape = _latent_shape(own, self.base, request, self._frames)
        self._dit = HostedDit(own, [*prompts, *against], self._shape)
        self._identity = {
            "model": identity, "captions": conditionings_identity([*prompts, *against]), "host": host_identity(),
        }  # fmt: skip
        self.operations = counted_operations(self._dit)
        self.notes = {
            "prompts": len(prompts), "width": request.latents.width, "height": request.latents.height,
            "rank": request.lora.rank, "targets": request.lora.targets, "frames": request.latents.frames,
            "image_tokens": self._dit.image_tokens(*self._shape[1:]), **self._which_levels(),
        }  # fmt: skip
        self._levels = {scale: self._levels_of(scale) for scale in request.scales}  # before anything takes time
        self._beside_weights = 0  # bytes; until they are counted, the host's own reserve

    def latents(self, progress: Progress) -> Tensor:
        """Return the latents to train on."""
        if self._given:
            size, model = self._request.latents, self._dit.patcher.model
            parts = Middles(self._given.pictures, size.width, size.height)
            latents = encoded_middles(
                self._given.vae,
                model,
                parts,
                lambda done, total: progress("encoding pictures", done, total, ""),
                self._frames,
            )
            self._identity["pictures"] = tensors_identity([latents])
            return latents
        return own_latents(
            self._dit,
            self._request.latents,
            self._shape,
            self._num_prompts,
            "".join(self._identity.values()),
            lambda done, total: progress("sampling latents, step", done, total, ""),
        )

    def count_memory(self, told: Callable[[str], None]) -> None:
        """Count what the training needs beside the weights, and say it; nothing on the CPU, where memory is shared."""
        device = self._dit.device
        if device.type == "cpu":
            return
        try:
            with counting():
                peak, self._beside_weights = _counted(self._dit, self._shape, self._request)
        except UncountableError as error:
            logger.exception("BlockSkip: memory could not be counted")
            told(f"The memory of this training could not be counted ({error}).")
            return
        free, place = room_on(device)
        told(f"Counted before the training: {format_bytes(peak)}; {place} has {format_bytes(free)} free.")

    def trained(
        self, scale: int, latents: Tensor, progress: Progress, seen: Callable[[int, DistillationResult], None],
        begun: Callable[[int, str], None], told: Callable[[str], None],
    ) -> TrainedScale:  # fmt: skip
        """Train the adapter of one patch size."""
        request, result = self._request, DistillationResult()
        captions = [number // self._per_prompt for number in range(len(latents))]
        level, levels = self._levels[scale]
        examples = Examples(latents, captions, level, request.settings.seed, self._negative, levels)
        resizing = PatchResizing(self.base.patch, scale, request.resize, self._frames)
        statistics = PatchStatistics.of(latents[examples.trained], resizing)
        numbers = self.base.channels * resizing.side**2
        with torch.inference_mode(False):
            patches = PatchAdapter(numbers, self.base.width, seed=request.settings.seed)
            coarse = CoarseAdapter(resizing, statistics, patches)
            parts = TrainedParts(self._dit, coarse, request.lora, request.settings.seed)
        identity = self._run_identity(scale)
        checkpoints = self._checkpoints(identity, result.problems)
        begun(scale, identity.key)

        def on_step(now: DistillationResult) -> None:
            seen(scale, now)
            progress(f"training patches of {scale}x, step", now.steps, request.settings.steps, _detail(now))

        def on_measuring(done: int, total: int) -> None:
            if not done:  # a Cancel in a measurement must not take the step before it from the curves
                seen(scale, result)
            progress(f"measuring patches of {scale}x, example", done, total, "")

        with (
            checkpoints.to_itself(lambda step: progress("waiting for another process, step", step, step + 1, "")),
            distilling(
                self._dit,
                parts,
                checkpointing=request.checkpointing,
                weights=request.weights,
                activation_bytes=self._beside_weights,
            ) as model,
        ):
            distill(
                model, examples, request.settings, result=result, checkpoints=checkpoints, on_step=on_step,
                on_measuring=on_measuring,
            )  # fmt: skip
        for problem in (*result.problems, *remark_on(result.overflows)):
            told(f"{scale}x: {problem}")
        errors, untrained = ErrorTable(levels, result.best_errors), ErrorTable(levels, result.untrained)
        patches.requires_grad_(False)
        return TrainedScale(coarse, parts.low_rank(), errors, untrained, result.best_step)

    def _levels_of(self, scale: int) -> tuple[Callable[[float], float], tuple[float, ...]]:
        """Return the map from uniform numbers to noise levels of examples, and the levels at which the error is measured."""
        request = self._request
        if request.coarse is None:
            return self._level(), levels_within(*request.noise)
        sigmas = [min(sigma, 1.0) for sigma in self._schedule(request.coarse.steps)]
        level = request.coarse.levels(sigmas, scale, request.scales, within=request.noise, least=SMALLEST_SIGMA)
        return level, levels_through(level)

    def _schedule(self, steps: int) -> list[float]:
        """Return the noise levels of the model's sampler with so many steps."""
        sampling = self._dit.patcher.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, self._request.latents.scheduler, steps).tolist()

    def _level(self) -> Callable[[float], float]:
        """Return the map from uniform numbers to noise levels: through the part of the sampler's schedule in the range."""
        sigmas = self._schedule(_SCHEDULE)
        lowest, highest = self._request.noise
        start, end = (_SCHEDULE - np.interp([highest, lowest], sigmas[::-1], range(_SCHEDULE + 1))).tolist()

        def level(uniform: float) -> float:
            place = start + uniform * (end - start)
            first = min(int(place), _SCHEDULE - 1)
            return sigmas[first] + (place - first) * (sigmas[first + 1] - sigmas[first])

        return level

    def _run_identity(self, scale: int) -> RunIdentity:
        request = self._request
        # The number of steps sets the learning rate of every step, so it belongs to the identity of a run.
        parts: Mapping[str, Any] = {
            "kind": "patch adapters", "version": _VERSION, **self._identity, "scale": scale, "resize": request.resize,
            "latents": request.latents.parts(), "settings": asdict(request.settings), "lora": asdict(request.lora),
            "checkpointing": request.checkpointing, **self._which_levels(),
        }  # fmt: skip
        return RunIdentity(parts)

    def _which_levels(self) -> dict[str, Any]:
        """Return which noise levels are trained on, or nothing if it is all of them, as of a training before one could choose."""
        (lowest, highest), coarse = self._request.noise, self._request.coarse
        chosen: dict[str, Any] = (
            {} if self._request.noise == ALL_LEVELS else {"noise_from": lowest, "noise_to": highest}
        )
        return chosen if coarse is None else {**chosen, "coarse_steps": coarse.describe()}

    def _checkpoints(self, identity: RunIdentity, problems: list[str]) -> Checkpoints:
        request = self._request
        folder = run_folder(identity.key)
        problems.extend(remove_old_runs(folder.parent, keep=KEPT_RUNS, exclude=identity.key))
        return Checkpoints(folder, identity, every=request.save_every, keep=_KEPT_STATES, resume=request.resume)


def _latent_frames(patcher: Any, request: PatchTraining) -> int:
    """Return the number of latent frames of an example.

    Raises:
        InvalidInputError: If the model makes pictures, or its clips have other lengths.
        UnsupportedModelError: If its coarse steps make pictures only.
    """
    frames = frames_of_clip(patcher, request.latents.frames)
    if frames > 1:
        require_clips(patcher)
    return frames


def _latent_shape(patcher: Any, base: ModelShape, request: PatchTraining, frames: int) -> tuple[int, int, int]:
    """Return (C, H, W) of the latents, where C counts the channels of all frames.

    Raises:
        InvalidInputError: If they are not cut into whole patches of every size.
    """
    cells = patcher.model.latent_format.spacial_downscale_ratio
    side = cells * base.patch * max(request.scales)
    width, height = request.latents.width, request.latents.height
    if width % side or height % side or not width or not height:
        raise InvalidInputError(
            f"width and height must be multiples of {side} px for these patch sizes, got {width} x {height}."
        )
    return base.channels * frames, height // cells, width // cells


def _detail(result: DistillationResult) -> str:
    parts = [f"loss {result.losses[-1]:.4f}"] if result.losses else []
    if result.measured:
        step, errors = result.measured[-1]
        untrained = sum(result.untrained) / len(result.untrained)
        parts.append(f"held-out error {sum(errors) / len(errors):.3f} at step {step} (untrained {untrained:.3f})")
    return " · ".join(parts)

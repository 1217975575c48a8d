"""RALU's three stages with the host's own sampler, guidance and model: coarse, mixed, fine.

To the host, each stage is a separate sampling run. So conditionings and memory follow the stage's size, and caches that
other nodes have put on the MODEL start over; they must, because the number of tokens changes between stages.

Source: RALU (arXiv 2507.08422), algorithm 1; see ``ralu`` for its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...errors import InvalidInputError
from ...ralu.noise_matching import restarted, seeded_noise
from ...ralu.overlay import refined_overlay
from ...ralu.timestep_matching import MAX_STAGES, StagePlan
from ...ralu.token_grid import MixedGrid, groups_of, latent_of_groups, upsampled
from ..inputs.conditioning import require_sampleable
from ..inputs.frames import with_frames, without_frames
from ..models.patches import require_sampled_in_stages
from .early_regions import RegionChoice
from .start_noise import start_noise
from .token_strips import MASKED_IMAGE_PROMPT, TokenStrips

_WITH_A_SIZE = {  # settings of a CONDITIONING that belong to one size, or to a picture
    "area": "an area",
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "reference_latents": "a reference picture",
    "concat_latent_image": "a picture to inpaint or to start from",
    "attention_mask_img_shape": MASKED_IMAGE_PROMPT,
    "set_area_to_bounds": "a mask whose bounds become an area",  # the host computes the area later
}


LAST_PICTURE = 4096


@dataclass(frozen=True)
class Sampled:
    """The result of a run.

    Attributes:
        latent: In the form that the host's samplers return.
        overlay: Which regions were refined early, shape (B, height, width, 3).
        tokens: Image tokens that the model saw in each stage.
    """

    latent: Tensor
    overlay: Tensor
    tokens: tuple[int, ...]


def empty_latent(patcher: Any, latent: Mapping[str, Any]) -> Tensor:
    """Return a LATENT's tensor in the form that the MODEL takes, as the host's samplers do.

    Returns:
        Shape (B, C, H, W), or with an axis of frames.

    Raises:
        InvalidInputError: If it is not the latent of a picture, or carries a mask.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise InvalidInputError(
            "Expected the latent of a picture, got several latents in one. Use an empty latent image."
        )
    if samples.ndim not in (4, 5) or 0 in samples.shape:
        raise InvalidInputError(
            f"Expected a latent of shape (batch, channels, height, width), got {tuple(samples.shape)}. Use an empty "
            "latent image."
        )
    if latent.get("noise_mask") is not None:
        raise InvalidInputError(
            "Region-adaptive sampling makes whole pictures, got a latent with a noise mask (inpainting). Use an empty "
            "latent image, or KSampler."
        )
    ratio = latent.get("downscale_ratio_spacial")
    return comfy.sample.fix_empty_latent_channels(patcher, samples, ratio)


class RegionAdaptiveSampler:
    """Samples from a MODEL in the stages of a plan.

    Args:
        patcher: The MODEL; a clone is sampled from.
        plan: Steps and noise levels.
        regions: How early regions are found; ignored with fewer than three stages.

    Raises:
        UnsupportedModelError: If the model's family is unknown, or it has a change that this cannot follow; see
            ``patches``.
        InvalidInputError: If regions are needed and a VAE is missing.
    """

    def __init__(self, patcher: Any, plan: StagePlan, regions: RegionChoice) -> None:
        require_sampled_in_stages(patcher)
        if len(plan.steps) == MAX_STAGES:
            regions.check()
        self.strips = TokenStrips(patcher)
        self.plan, self.regions = plan, regions

    def sample(
        self,
        positive: list,
        negative: list,
        cfg: float,
        latent: Tensor,
        seed: int,
        *,
        batch_indices: Any = None,
        on_step: Callable[[int, Tensor, Tensor, int], None] | None = None,
    ) -> Sampled:
        """Return pictures of a latent's shape; its values are ignored.

        Args:
            positive, negative: CONDITIONINGs.
            cfg: Guidance scale; 1 for guidance-distilled models.
            latent: See :func:`empty_latent`.
            seed: Seeds all noise, including the noise added between stages.
            batch_indices: Which of a seed's pictures these are, if the host's latents specify it.
            on_step: The host's callback, (step, clean estimate, noisy latent, steps of all stages).

        Raises:
            InvalidInputError: If the latent's size or a conditioning cannot be used.
        """
        require_sampleable(positive, "positive")
        require_sampleable(negative, "negative")
        self.strips.require_texts([*positive, *negative])
        _check_conditionings(positive, negative)
        self._check_size(latent)
        indices = _indices(batch_indices, len(latent))
        if not 0 <= seed < 2**64:
            raise InvalidInputError(f"seed must be between 0 and 2**64 - 1, got {seed}.")
        noise = start_noise(latent, seed, None if batch_indices is None else indices)
        run = _Run(self, noise, seed, indices, positive, negative, cfg, on_step)
        try:
            return run.all_stages()
        finally:
            self.strips.grid = None

    def _check_size(self, latent: Tensor) -> None:
        if latent.ndim == 5 and latent.shape[2] != 1:
            raise InvalidInputError(
                f"Region-adaptive sampling makes single pictures, got a latent of {latent.shape[2]} frames. Set its "
                "length to 1."
            )
        cells = self.strips.patcher.model.latent_format.spacial_downscale_ratio
        side = 2 * self.strips.patch * cells
        height, width = (length * cells for length in latent.shape[-2:])
        if len(self.plan.steps) > 1 and (height % side or width % side):
            raise InvalidInputError(
                f"Expected a width and a height that are multiples of {side} px, because coarse tokens are that large, "
                f"got {width} x {height}."
            )


def _indices(given: Any, count: int) -> list[int]:
    """Return which of a seed's pictures to make; limited, because the host draws the noise of all earlier ones too.

    Raises:
        InvalidInputError: If they are not whole numbers in range, or not one per picture.
    """
    if given is None:
        return list(range(count))
    good = isinstance(given, (list, tuple)) and all(
        isinstance(index, int) and 0 <= index < LAST_PICTURE for index in given
    )
    if not good or len(given) != count:
        raise InvalidInputError(
            f"A latent's batch_index must hold a whole number from 0 to {LAST_PICTURE - 1} for each of its {count} "
            "pictures. Use an empty latent image."
        )
    return list(given)


def _check_conditionings(*conditionings: list) -> None:
    """Refuse settings that belong to one size, before anything is sampled.

    Raises:
        InvalidInputError: Naming the settings that were found.
    """
    settings = [own for conditioning in conditionings for _, own in conditioning]
    found = [title for name, title in _WITH_A_SIZE.items() if any(_is_set(own.get(name)) for own in settings)]
    if found:
        raise InvalidInputError(
            f"Region-adaptive sampling takes text conditionings only, got {', '.join(found)}. Use KSampler for these."
        )


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


class _Run:
    """One batch of pictures on its way through the stages.

    Between stages ``_latent`` is the noisy latent at full size, in the model's own space and without a frame axis;
    coarse tokens appear four times.
    """

    def __init__(
        self,
        sampler: RegionAdaptiveSampler,
        noise: Tensor,
        seed: int,
        indices: Sequence[int],
        positive: list,
        negative: list,
        cfg: float,
        on_step: Callable[[int, Tensor, Tensor, int], None] | None,
    ) -> None:
        self._indices = indices
        self._strips, self._patch, self._plan = sampler.strips, sampler.strips.patch, sampler.plan
        self._regions = sampler.regions
        self._model = sampler.strips.patcher.model
        self._noise, self._seed, self._on_step = noise, seed, on_step
        self._conditionings = positive, negative, cfg
        height, width = noise.shape[-2:]
        self._grid = height // (2 * self._patch), width // (2 * self._patch)
        cells = self._model.latent_format.spacial_downscale_ratio
        self._pixels = height * cells, width * cells
        self._fine = torch.zeros(len(noise), *self._grid, dtype=torch.bool)
        self._overlay: Tensor | None = None
        self._latent: Tensor  # set, with its clean estimate, by the first stage
        self._clean: Tensor
        self._tokens: list[int] = []

    def all_stages(self) -> Sampled:
        """Run all stages."""
        kinds = {1: (), 2: (self._coarse,), 3: (self._coarse, self._mixed)}[len(self._plan.steps)]
        for number, stage in enumerate(kinds):
            stage(number)
        latent = self._full(len(kinds))
        overlay = refined_overlay(self._fine & False, self._pixels) if self._overlay is None else self._overlay
        return Sampled(latent, overlay, tuple(self._tokens))

    def _coarse(self, number: int) -> None:
        """Sample at half the side, with every other value of the noise, which is itself noise."""
        self._tokens.append(self._grid[0] * self._grid[1])
        self._sample(number, self._noise[..., ::2, ::2].contiguous())
        self._latent = upsampled(self._latent, self._patch)

    def _mixed(self, number: int) -> None:
        """Bring the regions that are prone to artefacts to full resolution, and continue sampling."""
        fine, pictures = self._regions.found(self._model, self._clean, self._grid, self._seed, self._indices)
        self._overlay = refined_overlay(fine, self._pixels, pictures)
        self._restart(number, fine)
        self._strips.grid = MixedGrid(fine)
        self._tokens.append(self._strips.grid.num_tokens)
        self._sample(number, self._noise)
        # A mask on a conditioning may have pulled the four places of a coarse token apart.
        grid, self._strips.grid = self._strips.grid.to(self._latent.device), None
        self._latent = grid.spread(grid.pick(self._latent, self._patch))

    def _full(self, number: int) -> Tensor:
        """Bring everything to full resolution, and sample to the end."""
        if number:
            self._restart(number, torch.ones_like(self._fine))
        self._tokens.append(-(-self._noise.shape[-2] // self._patch) * -(-self._noise.shape[-1] // self._patch))
        return self._sample(number, self._noise)

    def _restart(self, number: int, fine: Tensor) -> None:
        """Go back in time, with noise that makes the upsampled tokens independent."""
        groups = groups_of(self._latent, self._patch)
        noise = seeded_noise(groups.shape, self._seed, number, self._indices).to(groups)
        before, after = (flags.flatten(1).to(groups.device) for flags in (self._fine, fine))
        groups = restarted(groups, before, after, self._plan.restarts[number - 1], noise)
        self._latent = latent_of_groups(groups, self._grid[1], self._patch)
        self._fine = fine

    def _sample(self, number: int, noise: Tensor) -> Tensor:
        """Run one stage as a sampling run of the host, and return its result."""
        start = None if number == 0 else with_frames(self._model, self._latent)
        euler = EulerFrom(start)
        positive, negative, cfg = self._conditionings
        result = comfy.sample.sample_custom(
            self._strips.patcher,
            noise,
            cfg,
            euler,
            torch.FloatTensor(self._plan.sigmas[number]),
            positive,
            negative,
            torch.zeros_like(noise),
            callback=self._callback(number),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self._seed,
        )
        self._latent, self._clean = (without_frames(self._model, x) for x in (euler.state, euler.clean))
        return result

    def _callback(self, number: int) -> Callable[..., None]:
        done, total = sum(self._plan.steps[:number]), sum(self._plan.steps)

        def seen(step: int, clean: Tensor, noisy: Tensor, _: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if self._on_step is not None:
                self._on_step(done + step, clean, noisy, total)

        return seen


class EulerFrom(comfy.samplers.Sampler):
    """The host's Euler sampler, starting from a given state instead of noise; keeps the last state and clean estimate.

    The clean estimate is Tweedie's, from the velocity of the last step: x - sigma v.
    """

    def __init__(self, start: Tensor | None) -> None:
        self._start = start
        self.state: Tensor
        self.clean: Tensor

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None],
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Run the stage; the host calls this."""
        sampling = model_wrap.inner_model.model_sampling
        state = self._start
        if state is None:
            state = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))

        def seen(step: dict[str, Any]) -> None:
            self.clean = step["denoised"]
            callback(step["i"], step["denoised"], step["x"], len(sigmas) - 1)

        self.state = comfy.k_diffusion.sampling.sample_euler(
            model_wrap, state, sigmas, extra_args=extra_args, callback=seen, disable=disable_pbar
        )
        return sampling.inverse_noise_scaling(sigmas[-1], self.state)

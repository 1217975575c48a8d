"""A MODEL whose samplers may use coarse patches: wrappers around the host's own sampling, and nothing else.

Three wrappers on a clone. Around the whole run, one checks what else is on the MODEL by then, sampler, size and prompts,
moves the adapters to the device and begins the plan. Around every prediction, one decides the patch size, once for both
passes of guidance, and takes the clean estimate after guidance. Around the model, one replaces a coarse step's call
(``models.coarse_forward``); a step with the model's own patches passes through all three untouched.

Source: DDiT (arXiv 2602.16968). The decision presumes a trajectory without added noise, so samplers that add noise are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
from torch import Tensor

from ...ddit.plans import PatchChoice, PatchPlan
from ...ddit.trained_patches import TrainedPatches
from ...errors import InvalidInputError, PatchAdapterError, UnsupportedModelError
from ..inputs.frames import with_frames, without_frames
from ..models.coarse_forward import CoarseForward, require_clips, shape_of
from ..models.identity import module_identity
from ..models.patches import require_coarse_steps
from ..models.residency import unload
from .prompt_sizes import require_fitting_area, require_fitting_prompts
from .region_adaptive import EulerFrom
from .step_caches import StepCaches
from .token_strips import require_only_text

_KEY = "blockskip_dynamic_patches"
_WRAPPERS = comfy.patcher_extension.WrappersMP
WITHOUT_NOISE = (  # samplers of the host whose steps follow its noise levels, only downwards, and add no noise
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep",
    "gradient_estimation", "unipc", "unipc_bh2",
)  # fmt: skip
_ADDED_NOISE = ("s_churn", "eta")
_SAME_LEVEL = 1e-4  # some samplers compute their noise levels anew


@dataclass
class RunRecord:
    """What a run did.

    Attributes:
        scales: s of every step so far, one entry per noise level of the sampler.
        sigmas: Noise levels of the run, one more than steps.
        tokens: Image tokens of a step with the model's own patches, of all frames.
    """

    sigmas: Sequence[float]
    tokens: int
    scales: list[int] = field(default_factory=list)


class DynamicPatches:
    """A clone of a MODEL that samples with the patch sizes of a plan.

    Attributes:
        patcher: The clone; sample from this one.

    Args:
        patcher: The MODEL; left unchanged.
        trained: Its adapters.
        plan: Which steps are coarse.
        on_step: Called after every decision with the run so far; may raise to interrupt.

    Raises:
        UnsupportedModelError: If the family is not known, or the MODEL has a change that this cannot follow.
        PatchAdapterError: If the adapters were trained for another model.
    """

    def __init__(
        self, patcher: Any, trained: TrainedPatches, plan: PatchPlan, on_step: Callable[[RunRecord], None] | None = None
    ) -> None:
        require_coarse_steps(patcher)
        _require_plain_steps(patcher)
        require_fitting(patcher, trained)
        self._trained, self._plan, self._on_step = trained, plan, on_step
        self._model = patcher.model
        self._cells: int = patcher.model.latent_format.spacial_downscale_ratio  # pixels of a latent cell's side
        self._run: _Run | None = None
        self.patcher = patcher.clone()
        self._coarse = CoarseForward(self.patcher)
        self._coarse.prepare(self.patcher)
        self.patcher.add_wrapper_with_key(_WRAPPERS.OUTER_SAMPLE, _KEY, self._around_the_run)
        self.patcher.add_wrapper_with_key(_WRAPPERS.PREDICT_NOISE, _KEY, self._around_a_prediction)
        self.patcher.add_wrapper_with_key(_WRAPPERS.APPLY_MODEL, _KEY, self._around_the_model)

    def _around_the_run(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        # Again, because nodes behind this one may have changed the MODEL too.
        require_coarse_steps(executor.class_obj.model_patcher)
        require_deterministic(sampler)
        levels = [float(sigma) for sigma in sigmas]
        if len(levels) < 2:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        _require_falling(levels)
        self._require_fitting_size(noise)
        patch, frames = self._trained.base.patch, noise.shape[2] if noise.ndim == 5 else 1
        tokens = frames * (noise.shape[-2] // patch) * (noise.shape[-1] // patch)
        choice = self._plan.begin(levels, tokens, frames)
        self._require_fitting_prompts(executor.class_obj.conds, choice, noise)
        trained = self._trained.on(self.patcher.load_device)
        self._run = _Run(trained, choice, RunRecord(levels, tokens), self._on_step)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._run = None

    def _require_fitting_size(self, noise: Tensor) -> None:
        """Check that a latent can be cut into patches of every size.

        Raises:
            InvalidInputError: If it cannot, or is that of several things at once, such as of a video with sound.
            UnsupportedModelError: If it is a clip's, and coarse steps of this model make pictures only.
        """
        if noise.is_nested or noise.ndim not in (4, 5):
            raise InvalidInputError(
                f"Dynamic patches make pictures and clips, got a latent of shape {tuple(noise.shape)}. Connect the empty latent "
                "that belongs to the model."
            )
        if noise.ndim == 5 and noise.shape[2] > 1:
            require_clips(self.patcher)
        side = max(self._trained.scales) * self._trained.base.patch * self._cells
        height, width = (length * self._cells for length in noise.shape[-2:])
        if height % side or width % side:
            raise InvalidInputError(
                f"Expected a width and a height that are multiples of {side} px, because the largest patches of these "
                f"adapters are that large, got {width} x {height}."
            )

    def _require_fitting_prompts(self, conds: Mapping[str, list], choice: PatchChoice, noise: Tensor) -> None:
        """Check before the first step what coarse steps would refuse of the prompts.

        Raises:
            InvalidInputError: See ``prompt_sizes``.
        """
        largest = max(choice.possible(), default=1)
        if largest > 1:
            require_fitting_prompts(conds, noise, largest * self._trained.base.patch, self._cells)

    def _around_a_prediction(
        self, executor: Callable[..., Tensor], x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        run, sigma = self._run, float(timestep.flatten()[0])
        if run is None:
            return executor(x, timestep, *args, **kwargs)
        run.decide(sigma, without_frames(self._model, x))
        clean = executor(x, timestep, *args, **kwargs)
        run.choice.made(sigma, without_frames(self._model, clean))
        return clean

    def _around_the_model(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        run = self._run
        if run is None or run.scale == 1:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self._require_own_model(executor)
        require_only_text("Coarse steps take", "Remove these, or set the mode to off.", c_concat, control, kwargs)
        require_fitting_area(x.shape[-2:], run.scale * self._trained.base.patch, self._cells)
        options = run.caches.options_for(run.scale, options)

        def denoise(reduced: Tensor, level: Tensor) -> Tensor:
            latent = with_frames(self._model, reduced)
            return without_frames(
                self._model, executor(latent, level, c_concat, c_crossattn, control, options, **kwargs)
            )

        trained = run.trained.scales[run.scale]
        clean = self._coarse.renewed()(
            denoise, without_frames(self._model, x), t, trained.coarse, trained.lora, options, run.remembered
        )
        return with_frames(self._model, clean)

    def _require_own_model(self, executor: Any) -> None:
        """Refuse a copy of the model, on which the hooks would not be.

        Raises:
            InvalidInputError: If the host samples one.
        """
        if getattr(executor, "class_obj", self._model) is not self._model:
            raise InvalidInputError(
                "Dynamic patches change the calls of one model, but ComfyUI samples from a copy of it: a prompt carries "
                "hooks (its own LoRA), or several GPUs share the work. Remove these."
            )


class _Run:
    """One run of a sampler.

    Attributes:
        trained: The adapters, on the device.
        choice: Chooses the patch sizes.
        scale: s of the present step.
        caches: The host's caches of coarse calls.
    """

    def __init__(
        self,
        trained: TrainedPatches,
        choice: PatchChoice,
        record: RunRecord,
        on_step: Callable[[RunRecord], None] | None,
    ) -> None:
        self.trained, self.choice, self.scale = trained, choice, 1
        self._record, self._on_step = record, on_step
        self._step = -1
        self.caches = StepCaches()
        self.remembered: dict[Any, Tensor] = {}

    def decide(self, sigma: float, latent: Tensor) -> None:
        """Choose the patch size when the sampler comes to its next noise level.

        A sampler that calls the model several times between two noise levels uses one size for these calls. A call at the
        next level, as heun's second, has the size of the step that begins there.

        Raises:
            InvalidInputError: If the sampler goes back to a noise level.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.caches.next_prediction()
        levels = self._record.sigmas
        step = max((k for k, level in enumerate(levels[:-1]) if level >= sigma * (1.0 - _SAME_LEVEL)), default=0)
        if step == self._step:
            return
        if step < self._step:
            raise InvalidInputError(
                "Dynamic patches need a sampler whose noise levels only fall, and this one goes back to an earlier one. "
                "Choose euler, heun, dpmpp_2m or uni_pc."
            )
        for passed in range(self._step + 1, step + 1):  # one that a sampler steps over counts as the one before
            self.scale = self.choice.decide(passed, sigma, latent)
            self._record.scales.append(self.scale)
        self._step = step
        if self._on_step is not None:
            self._on_step(self._record)


def _require_plain_steps(patcher: Any) -> None:
    if patcher.get_wrappers(_WRAPPERS.OUTER_SAMPLE, _KEY):
        raise UnsupportedModelError(
            "The MODEL has dynamic patches already, and can only have those of one node. Take the other node out."
        )


def _require_falling(levels: Sequence[float]) -> None:
    """Check the noise levels of a run.

    Raises:
        InvalidInputError: If one is above the one before it.
    """
    for level, following in zip(levels, levels[1:], strict=False):
        if following > level:
            raise InvalidInputError(
                f"Dynamic patches need a sampler whose noise levels only fall, got levels that rise from {level:.4g} to "
                f"{following:.4g} (Flip Sigmas, or unsampling). Connect falling ones, or set the mode to off."
            )


def require_fitting(patcher: Any, trained: TrainedPatches) -> None:
    """Check that adapters belong to a MODEL; LoRAs and other patches on it do not matter.

    Raises:
        UnsupportedModelError: If the family is not known.
        PatchAdapterError: If they were trained for another model.
    """
    unload(patcher)  # a loaded model may have its patches in its weights
    own = shape_of(patcher, module_identity(patcher.model.diffusion_model))
    if own.family != trained.base.family or (own.width, own.channels) != (trained.base.width, trained.base.channels):
        raise PatchAdapterError(
            f"These patch adapters were trained for a {trained.base.family} model with tokens of width "
            f"{trained.base.width}, got a {own.family} model of width {own.width}. Load the model that they belong to."
        )
    if own.identity != trained.base.identity:
        raise PatchAdapterError(
            f"These patch adapters were trained for other weights of a {own.family} model. Load the file that they were "
            "trained with, in the same weight type, or train adapters for this one."
        )


def require_deterministic(sampler: Any) -> None:
    """Check that a sampler is one of those that are known to add no noise, and to step down the noise levels as given.

    Raises:
        InvalidInputError: If it is another, or set to add noise.
    """
    if type(sampler) is EulerFrom:
        raise InvalidInputError(
            "Dynamic patches need a sampler without stages, but the MODEL is on RALU Sampler, which has tokens of two sizes of its "
            "own. Give RALU Sampler the MODEL without Dynamic Patches (DDiT), or use another sampler."
        )
    function = getattr(sampler, "sampler_function", sampler)
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    options: Mapping[str, Any] = getattr(sampler, "extra_options", {})
    noisy = [key for key in _ADDED_NOISE if options.get(key)]
    if name not in WITHOUT_NOISE or noisy:
        what = f"{_listed(name)} with {', '.join(noisy)}" if noisy else _listed(name)
        raise InvalidInputError(
            f"Dynamic patches need one of these samplers, set to add no noise: {', '.join(map(_listed, WITHOUT_NOISE))}, "
            f"got {what}. Choose one of them, such as euler."
        )


def _listed(name: str) -> str:
    """Return a sampler's name as the host lists it."""
    return name.replace("unipc", "uni_pc")

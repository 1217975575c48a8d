"""Sample pictures during a training, from the model in memory with the LoRA applied.

Nothing is written into weights and nothing is copied: the model is loaded as in training, but whole, and the LoRA's
hooks are put on its kept blocks. So this happens between two steps, when no other run of the model is open. Loaded
weights are limited to the training's peak plus a budget; the rest stays in host memory, and the host casts it layer by
layer (unless it pages weights by itself, in which case it decides).

Pictures are sampled with Euler, which suits flow-matching models, using the host's own function and schedules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor, nn

from ...adapters.lora import LoraAdapters
from ...blocks.weight_sharing import weight_sharing_copy
from ...errors import InvalidInputError
from ...model import Denoiser
from ...selection.selection import BlockSelection
from ..inputs.conditioning import flatten_conditionings
from ..inputs.frames import latent_channels, with_frames
from ..models.hosted_dit import HostedDit
from ..models.identity import captions_identity
from ..models.residency import evict_others, unload
from .likeness import Likeness
from .plain_euler import euler_latent

logger = logging.getLogger(__name__)

MAX_PROMPTS = 16


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What to sample, and when.

    Attributes:
        positive: Single conditionings, each ``[[tensor, settings]]``; one picture each.
        negative: One such conditioning, or None; used with ``cfg`` above 1 only.
        vae: Decodes the latents.
        every: Training steps from one sampling to the next; the last step is always sampled.
        at_start: Whether to sample before the first step too.
        width, height: Pixels.
        steps: Number of sampler steps.
        cfg: Guidance scale; 1 for guidance-distilled models.
        scheduler: Name of one of the host's schedulers, which spread the steps over the noise levels.
        seed: Seed of the noise; the same for all prompts and times, so that pictures can be compared.
        budget_bytes: Device memory that sampling may use above the training's peak.
        likeness: Compares the pictures with the training pictures, or None.

    Raises:
        InvalidInputError: If a setting is out of range or something is missing.
    """

    positive: Sequence[list]
    negative: list | None
    vae: Any
    every: int
    at_start: bool = True
    width: int = 512
    height: int = 512
    steps: int = 20
    cfg: float = 1.0
    scheduler: str = "simple"
    seed: int = 0
    budget_bytes: float = 2.0 * 2**30
    likeness: Likeness | None = None

    def __post_init__(self) -> None:
        for name in ("every", "steps"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("width", "height"):
            side = getattr(self, name)
            if not 16 <= side <= 4096 or side % 16:
                raise InvalidInputError(f"{name} must be a multiple of 16 from 16 to 4096 px, got {side}.")
        require_guidance(self.cfg, self.negative is not None)
        if not 0.0 <= self.budget_bytes < float("inf"):
            raise InvalidInputError(f"memory_budget must not be negative, got {self.budget_bytes / 2**30}.")
        if self.scheduler not in comfy.samplers.SCHEDULER_NAMES:
            raise InvalidInputError(
                f"scheduler must be one of {', '.join(comfy.samplers.SCHEDULER_NAMES)}, got {self.scheduler!r}."
            )
        if len(self.positive) > MAX_PROMPTS:
            raise InvalidInputError(f"At most {MAX_PROMPTS} prompts are sampled, got {len(self.positive)}.")

    def is_due(self, step: int, last: int) -> bool:
        """Return whether pictures are due after ``step`` of ``last`` steps; 0 is before the first."""
        if step == 0:
            return self.at_start
        return step % self.every == 0 or step == last

    @property
    def identity(self) -> dict[str, str]:
        """What determines the pictures beside the LoRA (not when they are made), and what they are compared with."""
        prompts = captions_identity([*self.positive, *filter(None, [self.negative])])
        sampler = f"{self.steps} steps {self.scheduler} cfg {self.cfg} seed {self.seed}"
        return {
            "samples_of": f"{len(self.positive)} prompts {prompts} {self.width} x {self.height} {sampler}",
            "likeness_to": "" if self.likeness is None else self.likeness.identity,
        }


def require_request(samples: Any) -> None:
    """Raise InvalidInputError for anything but a request or None."""
    if samples is not None and not isinstance(samples, SampleRequest):
        raise InvalidInputError(f"samples must come from Sample While Training, got a {type(samples).__name__}.")


def require_guidance(cfg: float, has_negative: bool) -> None:
    """Raise InvalidInputError for a guidance scale out of range, or above 1 without a negative prompt."""
    if not 1.0 <= cfg <= 100.0:
        raise InvalidInputError(f"cfg must be between 1 and 100, got {cfg}.")
    if cfg > 1.0 and not has_negative:
        raise InvalidInputError("cfg above 1 needs a `negative`. Connect CLIP Text Encode with an empty text.")


def sample_request(positive: Sequence[Any], negative: Sequence[Any] | None, **settings: Any) -> SampleRequest:
    """Return a request for the host's CONDITIONINGs.

    Raises:
        InvalidInputError: As :class:`SampleRequest`, and if there is no prompt.
    """
    against = flatten_conditionings(negative, with_references=True)[0] if negative else None
    return SampleRequest(positive=flatten_conditionings(positive, with_references=True), negative=against, **settings)


class TrainingSampler:
    """Samples a request's pictures.

    Args:
        patcher: The MODEL; left unchanged.
        request: What to sample.
        selection: Blocks that are not trained; here they run like the others.

    Raises:
        InvalidInputError: If the model's latents cannot have that size.
    """

    def __init__(self, patcher: Any, request: SampleRequest, selection: BlockSelection) -> None:
        self.request = request
        form, width, height = patcher.model.latent_format, request.width, request.height
        cell = form.spacial_downscale_ratio
        self._shape = (latent_channels(patcher.model), height // cell, width // cell)
        captions = [*request.positive, *([request.negative] if request.cfg > 1.0 and request.negative else [])]
        self._dit = HostedDit(patcher, captions, self._shape)
        multiple = cell * self._dit.adapter.patch_size
        if width % multiple or height % multiple:
            raise InvalidInputError(
                f"width and height must be multiples of {multiple} px for this model, got {width} and {height}."
            )
        self._kept = [self._dit.blocks[index].name for index in selection.kept]

    def pictures(
        self, adapters: LoraAdapters, *, training_peak: int, on_step: Callable[[int, int], None]
    ) -> list[Tensor]:
        """Return one picture per prompt, each (H, W, 3) in [0, 1], on the CPU.

        Args:
            adapters: The LoRA, on the model's device.
            training_peak: Bytes on the device that the training needs.
            on_step: Called after every sampler step with (done, total); may raise to interrupt.
        """
        unload(self._dit.patcher)
        evict_others(self._dit.patcher)  # before checking how much is free
        copies = {
            name: weight_sharing_copy(self._dit.module(name)) for name in self._kept
        }  # all else is copied as well
        layers = {name: _layer(copies, name) for name in adapters.names}
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self._dit.running(copies, activation_bytes=self._to_keep_free(training_peak)) as denoise,
            adapters.attached(layers, self._dit.weight_for_backward),
        ):
            latents = [self._latent(denoise, prompt, on_step) for prompt in range(len(self.request.positive))]
        return [self._decoded(latent) for latent in latents]

    def _to_keep_free(self, training_peak: int) -> int:
        """Return the bytes that the host should leave free, so that weights stay within their limit."""
        model = self._dit.patcher.model
        size = [1 + (self.request.cfg > 1.0), *self._shape]
        prompts = self.request.positive
        activations = max(int(model.memory_required(size, _shapes_beside_text(model, prompt))) for prompt in prompts)
        weights = max(0.0, training_peak + self.request.budget_bytes - activations)
        free = comfy.model_management.get_free_memory(self._dit.device)
        return max(activations, int(free - weights))

    def _latent(self, denoise: Denoiser, prompt: int, on_step: Callable[[int, int], None]) -> Tensor:
        request = self.request
        num_prompts = len(request.positive)
        return euler_latent(
            self._dit,
            denoise,
            self._shape,
            prompt=prompt,
            against=num_prompts,
            cfg=request.cfg,
            scheduler=request.scheduler,
            steps=request.steps,
            seed=request.seed,
            on_step=lambda done: on_step(prompt * request.steps + done, num_prompts * request.steps),
        )

    def _decoded(self, latent: Tensor) -> Tensor:
        model = self._dit.patcher.model
        return decoded(self.request.vae, model.process_latent_out(with_frames(model, latent)))


def decoded(vae: Any, latent: Tensor) -> Tensor:
    """Return the picture that a VAE makes of one latent as the host's samplers return it: (H, W, 3) in [0, 1], on the CPU."""
    picture = vae.decode(latent)
    picture = picture[0, 0] if picture.ndim == 5 else picture[0]
    return picture[..., :3].float().cpu().clamp(0.0, 1.0)


def _shapes_beside_text(model: Any, prompt: list) -> dict[str, list[list[int]]]:
    """Return the shapes of what a prompt carries beside its text, by argument, as the host estimates memory from."""
    shapes = model.extra_conds_shapes(**prompt[0][1])
    return {name: [shape] for name, shape in shapes.items()}


def _layer(copies: dict[str, nn.Module], name: str) -> nn.Module:
    block = next(block for block in copies if name.startswith(block + "."))
    return copies[block].get_submodule(name.removeprefix(block + "."))

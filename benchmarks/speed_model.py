"""Models of ComfyUI's own FLUX class with random weights, and what training them needs.

Only time is measured, and the values of the weights do not affect it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig
from blockskip_pack.blockskip_core.data.schedule import TrainingSchedule, draw_schedule
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.residuals.cache import CacheIdentity
from blockskip_pack.blockskip_core.residuals.precompute import Precomputed, precompute_residuals
from blockskip_pack.blockskip_core.residuals.residual_set import ResidualSet
from blockskip_pack.blockskip_core.residuals.source import OpenResiduals
from blockskip_pack.blockskip_core.selection.presets import preset_selection
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from torch import Tensor

PIXELS_PER_CELL = 8  # of FLUX's autoencoder
CHANNELS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a FLUX.1.

    Attributes:
        width, heads, double, single: Sizes of the transformer; its MLPs are four times as wide, as in FLUX.1.
        context, pooled: Widths of the text tokens and of the pooled text.
        text_tokens: Number of text tokens in a caption. For a short caption ComfyUI gives FLUX.1 256.
        guidance: Whether it takes a guidance value, like FLUX.1-dev.
    """

    width: int
    heads: int
    double: int
    single: int
    context: int
    pooled: int
    text_tokens: int = 256
    guidance: bool = True

    @property
    def num_blocks(self) -> int:
        """Number of all blocks."""
        return self.double + self.single


SHAPES = {
    "flux-dev": Shape(width=3072, heads=24, double=19, single=38, context=4096, pooled=768),
    "mid": Shape(width=1024, heads=8, double=4, single=8, context=1344, pooled=256),  # the same proportions
    "tiny": Shape(width=64, heads=2, double=2, single=4, context=16, pooled=16, text_tokens=5),
}


def fastest_dtype(device: torch.device, seconds: float = 0.3) -> tuple[torch.dtype, str]:
    """Return the dtype in which a FLUX-like product is fastest here, and a sentence that says so."""
    if device.type != "cpu":
        return torch.bfloat16, "The model is in bfloat16."
    paces = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(512, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
        torch.nn.functional.linear(x, weight)
        taken, start = [], time.perf_counter()
        while time.perf_counter() - start < seconds or len(taken) < 3:
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            taken.append(time.perf_counter() - began)
        paces[dtype] = 2 * 512 * 1024 * 4096 / statistics.median(taken) / 1e9
    best = max(paces, key=paces.__getitem__)
    told = ", ".join(f"{str(dtype).removeprefix('torch.')} {pace:.0f}" for dtype, pace in paces.items())
    return best, f"The model is in {str(best).removeprefix('torch.')}, which is faster here (GFLOP/s: {told})."


@torch.inference_mode(False)  # whatever mode the caller is in, create tensors that autograd may save
def build_flux(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a MODEL with random weights, made on the device that runs it and kept where the host keeps models.

    It has the factory that ComfyUI's loaders attach to a MODEL, which core's trainer calls to get its own modules. A
    loader would read the file again; this factory returns new modules over the same weights.
    """
    import comfy.model_management

    model = _model_of(shape, dtype, comfy.model_management.unet_offload_device())
    randomise(model, dtype, seed)

    @torch.inference_mode(False)
    def again(disable_dynamic: bool = False) -> Any:
        twin = _model_of(shape, dtype, torch.device("meta"))
        for name, weights in list(model.diffusion_model.named_parameters()):
            path, _, leaf = name.rpartition(".")
            twin.diffusion_model.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(weights.detach(), False)
        return _patcher_of(twin, disable_dynamic)

    patcher = _patcher_of(model, False)
    patcher.cached_patcher_init = (again, ())
    return patcher


def randomise(model: torch.nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Give a model random weights of a usual size, made on the device that runs it."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=dtype) * fan
            parameter.copy_(1.0 + 0.1 * noise if name.endswith(("norm.scale", "norm.weight")) else noise)
    model.requires_grad_(False)


def _model_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    import comfy.model_base
    import comfy.supported_models

    head = shape.width // shape.heads
    third = head * 7 // 16 // 2 * 2  # FLUX.1: 16 + 56 + 56 of 128
    config = {
        "image_model": "flux",
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 2,
        "vec_in_dim": shape.pooled,
        "context_in_dim": shape.context,
        "hidden_size": shape.width,
        "mlp_ratio": 4.0,
        "num_heads": shape.heads,
        "depth": shape.double,
        "depth_single_blocks": shape.single,
        "axes_dim": [head - 2 * third, third, third],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": shape.guidance,
        "txt_ids_dims": [],
    }
    supported = (comfy.supported_models.Flux if shape.guidance else comfy.supported_models.FluxSchnell)(config)
    supported.custom_operations = None
    supported.set_inference_dtype(dtype, None)
    return comfy.model_base.Flux(supported, device=device)


def _patcher_of(model: Any, disable_dynamic: bool) -> Any:
    import comfy.model_management as management
    import comfy.model_patcher

    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return kind(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


@dataclass
class Lab:
    """A model, its training data at any size, and the residuals computed so far.

    Attributes:
        shape, dtype: Shape and dtype of the model.
        folder: Folder for caches on disk.
        sizes: Pixels per side of the large and the small training pictures.
        draws: Number of training examples of each size; a longer run starts over.
        rank: Rank of every LoRA.
        unit: Pictures are multiples of this many pixels.
    """

    shape: Shape
    dtype: torch.dtype
    folder: Path
    sizes: tuple[int, int] = (512, 256)
    draws: int = 4
    rank: int = 16
    unit: int = 16
    _computed: dict[tuple[int, float], Precomputed] = field(default_factory=dict)

    @cached_property
    def patcher(self) -> Any:
        """The MODEL."""
        return build_flux(self.shape, self.dtype)

    @cached_property
    def caption(self) -> list:
        """One CONDITIONING."""
        generator = torch.Generator().manual_seed(1)
        settings: dict[str, Any] = {"pooled_output": torch.randn(1, self.shape.pooled, generator=generator)}
        if self.shape.guidance:
            settings["guidance"] = 3.5
        return [[torch.randn(1, self.shape.text_tokens, self.shape.context, generator=generator), settings]]

    def latents(self, size: int) -> Tensor:
        """Return clean latents of all draws, shape (draws, C, H, W)."""
        side = size // PIXELS_PER_CELL
        return torch.randn(self.draws, CHANNELS, side, side, generator=torch.Generator().manual_seed(size))

    def schedule(self, size: int) -> TrainingSchedule:
        """Return draws whose crops are whole pictures of this size."""
        return draw_schedule(
            [(size, size)] * self.draws,
            num_captions=1,
            num_draws=self.draws,
            patches=PatchConfig(patch_min=size, patch_max=size, multiple=self.unit, order="fixed"),
            sample_sigmas=lambda count, generator: torch.rand(count, generator=generator) * 0.9 + 0.05,
            seed=0,
        )

    def hosted(self, size: int) -> HostedDit:
        """Return the MODEL as the package sees it."""
        return HostedDit(self.patcher, [self.caption], self.latents(size).shape[1:])

    def selection(self, ratio: float) -> BlockSelection:
        """Return the paper's choice for FLUX.1, scaled; no block for ratio 0."""
        if ratio:
            return preset_selection(ratio, self.shape.num_blocks, "flux")
        return BlockSelection(front=0, back=0, num_blocks=self.shape.num_blocks, family="flux")

    def in_memory(self, size: int, ratio: float) -> InMemory:
        """Return the residuals of all draws, computed once."""
        if (size, ratio) not in self._computed:
            self._computed[size, ratio] = precompute_residuals(
                self.hosted(size), self.schedule(size), self.latents(size), self.selection(ratio), range(self.draws)
            )
        return InMemory(self._computed[size, ratio])

    def residual_set(self, size: int, ratio: float) -> ResidualSet:
        """Return the same residuals for storage on disk."""
        parts = dict.fromkeys(("model", "schedule", "selection", "pictures", "captions", "host"), "speed")
        return ResidualSet(
            schedule=self.schedule(size),
            latents=self.latents(size),
            selection=self.selection(ratio),
            captions=[self.caption],
            identity=CacheIdentity(**parts, dtype=str(self.dtype)),
            storage="disk",
            chunk_size=64,
            folder=self.folder / f"{size}-{ratio}",
            family="flux",
        )


@dataclass(frozen=True)
class InMemory:
    """A source whose residuals are in memory."""

    computed: Precomputed

    def stretches(self, run: MicroBatches, start: int = 0) -> Any:
        """Yield the whole run as one stretch."""
        computed = self.computed
        yield nullcontext(OpenResiduals(range(start, len(run)), computed.residuals.__getitem__, computed.reference))


def settle() -> None:
    """Unload everything, so that no arm is affected by what another left in memory."""
    import gc

    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, including work queued on the device."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

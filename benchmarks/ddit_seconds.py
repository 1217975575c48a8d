"""Processor seconds of a step by patch size, on models of ComfyUI's own classes with random weights, beside the counted ratio.

The values of weights do not affect the time, so adapters are random too. The models have fewer and narrower blocks than the
published ones, so that a step takes seconds on one core of a processor.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from blockskip_pack.blockskip_core.adapters.lora import LoraSettings
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.error_table import ErrorTable
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.ddit.plans import TypedWindows
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches, TrainedScale
from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import TrainedParts
from blockskip_pack.blockskip_core.hosts.models.coarse_forward import shape_of
from blockskip_pack.blockskip_core.hosts.models.counted_calls import counted_operations
from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit
from blockskip_pack.blockskip_core.hosts.models.identity import module_identity
from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches
from ddit_operations import RANK, SCALES
from speed_model import Shape, build_flux, randomise
from torch import Tensor

TEXT_TOKENS = 512
logger = logging.getLogger("__main__")

FLUX = Shape(width=768, heads=6, double=3, single=6, context=768, pooled=256, text_tokens=TEXT_TOKENS)
WAN = {  # the proportions of Wan 2.1 1.3B, which has 30 blocks of width 1536
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": 512, "ffn_dim": 2944, "num_heads": 4,
    "num_layers": 4, "in_dim": 16, "out_dim": 16, "freq_dim": 256, "text_dim": 512, "qk_norm": True, "cross_attn_norm": True,
    "eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a size.

    Attributes:
        model: Readable name.
        size: Readable size.
        build: Returns the MODEL.
        latent: Shape without the batch axis, as the host has it.
        text_width: Of the text's tokens.
    """

    model: str
    size: str
    build: Callable[[], Any]
    latent: tuple[int, ...]
    text_width: int


def build_wan() -> Any:
    """Return a MODEL with random weights."""
    supported = comfy.supported_models.WAN21_T2V(dict(WAN))
    supported.custom_operations = None
    supported.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = supported.get_model({}, "", device=comfy.model_management.unet_offload_device())
        randomise(model, torch.float32)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )  # fmt: skip


def _flux(side: int) -> Case:
    name = f"FLUX.1, {FLUX.double} + {FLUX.single} blocks of width {FLUX.width}"
    return Case(name, f"{side} px", lambda: build_flux(FLUX, torch.float32), (16, side // 8, side // 8), FLUX.context)


def _wan(pictures: int) -> Case:
    name = f"Wan 2.1, {WAN['num_layers']} blocks of width {WAN['dim']}"
    size = (16, (pictures - 1) // 4 + 1, 32, 56)
    return Case(name, f"448 x 256 px, {pictures} pictures", build_wan, size, 512)


CASES = (_flux(512), _flux(1024), _wan(33), _wan(81))


def rows(repeats: int) -> list[dict[str, Any]]:
    """Return a row per model, size and patch size: the median of some steps, all patch sizes in turns.

    Args:
        repeats: Number of steps of each patch size, after one that is not counted.
    """
    found = []
    for case in CASES:
        model = case.build()
        conditioning = _conditioning(case)
        trained = _random_adapters(model, conditioning, case)
        arms = {scale: _step(model, trained, conditioning, case, scale) for scale in (1, *SCALES)}
        seconds: dict[int, list[float]] = {scale: [] for scale in arms}
        for _ in range(repeats + 1):
            for scale, step in arms.items():
                start = time.process_time()
                step()
                seconds[scale].append(time.process_time() - start)
        medians = {scale: statistics.median(taken[1:]) for scale, taken in seconds.items()}
        tokens = trained.notes["tokens"]
        operations = trained.operations_of(tokens)
        for scale, median in medians.items():
            row = {
                "model": case.model, "size": case.size, "scale": scale, "tokens": tokens // scale**2, "seconds": median,
                "measured": medians[1] / median, "counted": operations[1] / operations[scale], "repeats": repeats,
                "text_tokens": TEXT_TOKENS, "threads": torch.get_num_threads(),
            }  # fmt: skip
            logger.info("%s", row)
            found.append(row)
    return found


def _conditioning(case: Case) -> list:
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(1, FLUX.pooled, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, case.text_width, generator=generator)
    return [[text, {"pooled_output": pooled, "guidance": 3.5}]]


def _random_adapters(model: Any, conditioning: list, case: Case) -> TrainedPatches:
    """Return adapters with tensors as a training makes them, of random values."""
    base = shape_of(model, module_identity(model.model.diffusion_model))
    frames = case.latent[1] if len(case.latent) == 4 else 1
    shape = (base.channels * frames, *case.latent[-2:])
    dit, table, scales = HostedDit(model.clone(), [conditioning], shape), ErrorTable((0.5,), (0.0,)), {}
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    for scale in SCALES:
        resizing = PatchResizing(base.patch, scale, "nearest", frames)
        patches = PatchAdapter(base.channels * resizing.side**2, base.width)
        coarse = CoarseAdapter(resizing, PatchStatistics.of(latents, resizing), patches)
        lora = LoraSettings(rank=RANK, alpha=float(RANK), targets="mlp")
        with torch.inference_mode(False):
            parts = TrainedParts(dit, coarse, lora, 0)
        patches.requires_grad_(False)
        scales[scale] = TrainedScale(coarse, parts.low_rank(), table, table)
    tokens = dit.image_tokens(*shape[1:])
    return TrainedPatches(base, scales, counted_operations(dit), {"tokens": tokens})


def _step(model: Any, trained: TrainedPatches, conditioning: list, case: Case, scale: int) -> Callable[[], Tensor]:
    """Return a function that samples one step with patches of a size, without guidance."""
    windows = "" if scale == 1 else f"1: {scale}"
    patched = DynamicPatches(model, trained, TypedWindows(windows, SCALES)).patcher
    latent = torch.zeros(1, *case.latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

    def step() -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                patched, noise, 1, 1.0, "euler", "simple", conditioning, conditioning, latent, seed=0, disable_pbar=True
            )

    return step

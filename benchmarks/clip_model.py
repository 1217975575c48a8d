"""A small Wan 2.1 of ComfyUI's own class, trained on the world of clips from scratch."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import clip_world
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from clip_world import SEEN, any_middle, drawn, to_latents, tokens_of
from torch import Tensor, nn

SHIFT = 3.0  # of the noise levels, as Wan 2.1 is used for small pictures
WIDTH = 64
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": WIDTH, "ffn_dim": 4 * WIDTH, "num_heads": 2,
    "num_layers": 4, "in_dim": clip_world.CELL**2, "out_dim": clip_world.CELL**2, "freq_dim": 64,
    "text_dim": clip_world.TEXT_WIDTH, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
BATCH, RATE, WARMUP, WITHOUT_PROMPT = 8, 3e-3, 20, 0.1
FOLLOWED = 0.99  # of the average of the weights is kept at a step
logger = logging.getLogger("__main__")


def build() -> Any:
    """Return a MODEL with initial weights: Xavier's, and zeros for all that changes the stream, as in adaLN-zero."""
    supported = comfy.supported_models.WAN21_T2V(dict(WAN))
    supported.sampling_settings = {"shift": SHIFT}
    supported.custom_operations = comfy.ops.disable_weight_init
    supported.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = supported.get_model({}, "", device=torch.device("cpu"))
        _initialise(model.diffusion_model)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu")
    )


def _initialise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
            elif weight.ndim < 2 or name.endswith("modulation"):
                weight.zero_()
            else:
                nn.init.xavier_uniform_(weight.view(len(weight), -1), generator=generator)
        for layer in (model.time_projection[1], model.head.head, *(block.cross_attn.o for block in model.blocks)):
            layer.weight.zero_()


def train(patcher: Any, steps: int) -> dict[str, Any]:
    """Train a MODEL of :func:`build`, and leave the average of its weights in it; return the row of the report."""
    model, generator = patcher.model.diffusion_model, torch.Generator().manual_seed(1)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimisers = _optimisers(model.requires_grad_(True))
    losses, started, last = [], time.process_time(), time.perf_counter()
    comfy.model_management.in_training = True
    try:
        for step in range(steps):
            loss = _loss(model, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    average[name].lerp_(weight, 1.0 - min(FOLLOWED, (1 + step) / (10 + step)))
            losses.append(loss.item())
            if time.perf_counter() - last > 30.0:
                last = time.perf_counter()
                logger.info("clips: step %d of %d, loss %.3f", step, steps, sum(losses[-20:]) / len(losses[-20:]))
    finally:
        comfy.model_management.in_training = False
        model.requires_grad_(False)
    model.load_state_dict(average, strict=False)
    return {
        "weights": sum(weight.numel() for weight in model.parameters()), "steps": steps, "batch": BATCH,
        "loss": sum(losses[-50:]) / len(losses[-50:]), "seconds": round(time.process_time() - started),
    }  # fmt: skip


def _optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and Adam for everything else."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=RATE, betas=(0.9, 0.99)),
    ]


def _loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Return the error of the velocity, noise minus clip, of a batch of new clips."""
    scenes = [SEEN[int(place)] for place in torch.randint(len(SEEN), (BATCH,), generator=generator)]
    clean = to_latents(torch.stack([drawn(scene, any_middle(scene, generator)) for scene in scenes]))
    unprompted = torch.rand(BATCH, generator=generator) < WITHOUT_PROMPT
    text = torch.stack([tokens_of(None if bare else scene) for scene, bare in zip(scenes, unprompted, strict=True)])
    uniform = torch.rand(BATCH, generator=generator)
    sigma = SHIFT * uniform / (1.0 + (SHIFT - 1.0) * uniform)
    noise, mix = torch.randn(clean.shape, generator=generator), sigma.view(-1, 1, 1, 1, 1)
    velocity = model((1.0 - mix) * clean + mix * noise, 1000.0 * sigma, text)
    return (velocity - (noise - clean)).square().mean()

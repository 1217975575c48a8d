"""The world's diffusion transformer: ComfyUI's own FLUX class in the layout of FLUX.1 schnell, very small.

Head size 128 as in FLUX.1, so one head; 4 double and 8 single blocks; no guidance embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.flux.model
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONTEXT_DIM, POOLED_DIM = 64, 32
HIDDEN = 128
DIT_CONFIG: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": POOLED_DIM,
    "context_in_dim": CONTEXT_DIM,
    "hidden_size": HIDDEN,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 4,
    "depth_single_blocks": 8,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


class OutOfPlace(TorchFunctionMode):
    """Run ComfyUI's in-place residual sums out of place, as autograd requires."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        func = torch.add if func is Tensor.add_ else func
        return func(*args, **(kwargs or {}))


def build_dit(device: torch.device) -> nn.Module:
    """A fresh model: Xavier weights, and zeros for the blocks' gates and the output (adaLN-zero)."""
    model = comfy.ldm.flux.model.Flux(
        **DIT_CONFIG, dtype=torch.float32, device=device, operations=comfy.ops.disable_weight_init
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    quiet = [block.img_mod.lin for block in model.double_blocks]
    quiet += [block.txt_mod.lin for block in model.double_blocks]
    quiet += [block.modulation.lin for block in model.single_blocks]
    for layer in (*quiet, model.final_layer.adaLN_modulation[-1], model.final_layer.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def prepare_for_training(model: nn.Module, compiled: bool = False) -> None:
    """Make every block differentiable, and fuse its small operations if ``compiled``."""
    comfy.model_management.in_training = True
    torch._dynamo.config.recompile_limit = 64
    for block in (*model.double_blocks, *model.single_blocks):
        forward = _out_of_place(block.forward)
        block.forward = torch.compile(forward, dynamic=False) if compiled else forward


def _out_of_place(forward: Callable) -> Callable:
    """The same function under :class:`OutOfPlace`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with OutOfPlace():
            return forward(*args, **kwargs)

    return wrapped


def flow_loss(
    model: nn.Module, latents: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, weights: Tensor
) -> Tensor:
    """Rectified-flow loss per picture ``[B]`` on latents as a FLUX model sees them.

    ``latents [B, 16, h, w]``, ``sigma [B]``, ``context [B, L, C]``, ``pooled [B, P]``, ``weights [B, h, w]``; the model predicts
    ``noise - latent`` and is told the noise level itself, as ComfyUI does for FLUX.1 schnell.
    """
    noise = torch.randn_like(latents)
    mix = sigma.view(-1, 1, 1, 1)
    predicted = model((1 - mix) * latents + mix * noise, sigma, context, pooled)
    error = (predicted.float() - (noise - latents)).square().mean(dim=1)
    return (weights * error).mean(dim=(1, 2))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weight matrices inside the blocks."""
    blocks = (*model.double_blocks, *model.single_blocks)
    return [p for block in blocks for p in block.parameters() if p.ndim == 2]


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the query and key norms as FLUX files do, which every ComfyUI version reads."""
    return {key.replace("_norm.weight", "_norm.scale"): value for key, value in state.items()}


def comfy_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`published_names`."""
    return {key.replace("_norm.scale", "_norm.weight"): value for key, value in state.items()}

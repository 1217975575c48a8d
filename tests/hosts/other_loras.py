"""LoRAs for a MODEL in other programs' formats, with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Pairs = dict[str, tuple[Tensor, Tensor]]  # layer -> (up, down)


def pairs(patcher, blocks: Sequence[str], rank: int | Callable[[int], int] = 2, seed: int = 0) -> Pairs:
    """Return a pair for every linear layer of some blocks; ``rank`` may depend on the place of the layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: layer
        for name, layer in patcher.model.diffusion_model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(tuple(f"{block}." for block in blocks))
    }
    made = {}
    for place, (name, layer) in enumerate(layers.items()):
        r = rank(place) if callable(rank) else rank
        up = torch.randn(layer.out_features, r, generator=generator) * 0.05
        made[name] = (up, torch.randn(r, layer.in_features, generator=generator) * 0.05)
    return made


def native(made: Pairs) -> dict[str, Tensor]:
    """Like diffusion-pipe and ai-toolkit for models without separate names in diffusers."""
    return {
        f"diffusion_model.{name}.lora_{part}.weight": tensor
        for name, (up, down) in made.items()
        for part, tensor in (("A", down), ("B", up))
    }


def kohya(made: Pairs, alpha: float) -> dict[str, Tensor]:
    """Like sd-scripts and musubi-tuner."""
    tensors = {}
    for name, (up, down) in made.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def diffusers(
    patcher, blocks: Sequence[str], rank: int = 2, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Like diffusers' own scripts, ai-toolkit, SimpleTuner and OneTrainer for FLUX.1: every part of a layer separately.

    Returns:
        (Tensors of the file, layer -> change of its whole weight.)
    """
    model = patcher.model.diffusion_model
    width, mlp = model.hidden_size, model.single_blocks[0].mlp_hidden_dim
    thirds = [(0, width), (width, width), (2 * width, width)]
    split = {
        "img_attn.qkv": list(zip(("attn.to_q", "attn.to_k", "attn.to_v"), thirds, strict=True)),
        "txt_attn.qkv": list(zip(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), thirds, strict=True)),
        "linear1": [
            *zip(("attn.to_q", "attn.to_k", "attn.to_v"), thirds, strict=True), ("proj_mlp", (3 * width, mlp)),
        ],
    }  # fmt: skip
    renamed = {
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "linear2": "proj_out",
        "modulation.lin": "norm.linear",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors, change = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not name.startswith(tuple(f"{block}." for block in blocks)):
            continue
        kind, number, own = name.split(".", 2)
        block = f"transformer.{'single_' if kind == 'single_blocks' else ''}transformer_blocks.{number}"
        parts = split[own] if own in split else [(renamed[own], (0, layer.out_features))]
        change[name] = torch.zeros(layer.out_features, layer.in_features)
        for part, (first, rows) in parts:
            up = torch.randn(rows, rank, generator=generator) * 0.05
            down = torch.randn(rank, layer.in_features, generator=generator) * 0.05
            tensors |= {f"{block}.{part}.lora_B.weight": up, f"{block}.{part}.lora_A.weight": down}
            change[name][first : first + rows] = up @ down
    return tensors, change

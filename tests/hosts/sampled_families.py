"""Tiny models of the families that are only sampled, in addition to those of ``families``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .tiny_families import FAMILIES, TinyFamily, tiny_model


def built(supported: str, config: dict[str, Any], **settings: Any):
    """A MODEL; the test is skipped if ComfyUI is older than the family."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, supported):
        pytest.skip(f"this ComfyUI has no {supported}")
    return tiny_model(supported, config, **settings)


def _llama(generator: torch.Generator) -> dict[str, Any]:
    return {
        "pooled_output": torch.randn(1, 16, generator=generator),
        "conditioning_llama3": torch.randn(1, 4, 6, 20, generator=generator),
    }


def _with_llama(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {
        "c_crossattn": text,
        "y": torch.cat([row["pooled_output"] for row in rows]),
        "encoder_hidden_states_llama3": torch.cat([row["conditioning_llama3"] for row in rows]),
    }


def _with_guidance(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {"c_crossattn": text, "guidance": torch.full((len(rows),), 6.0)}


def unmasked(generator: torch.Generator) -> dict[str, Any]:
    """Settings with a mask that hides nothing of a text of five tokens."""
    return {"pooled_output": None, "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def with_length(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    """Arguments with the number of text tokens."""
    return {"c_crossattn": text, "num_tokens": text.shape[1]}


SAMPLED_ONLY: tuple[TinyFamily, ...] = (
    TinyFamily(
        name="hidream", family="hidream", blocks=(), layers=frozenset(), latent_shape=(16, 6, 10), text_width=20, settings=_llama,
        extra=_with_llama,
        build=partial(built, "HiDream", {
            "image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "caption_channels": [20, 20],
            "max_resolution": [128, 128], "in_channels": 16, "out_channels": 16, "llama_layers": [0, 1, 2, 3],
            "num_attention_heads": 2, "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 2,
            "num_single_layers": 2, "patch_size": 2, "text_emb_dim": 16,
        }),
    ),
    TinyFamily(
        name="krea2", family="", blocks=(), layers=frozenset(), latent_shape=(16, 6, 10), text_width=60, frames=True,
        build=partial(built, "Krea2", {
            "image_model": "krea2", "features": 64, "tdim": 16, "txtdim": 20, "heads": 4, "kvheads": 2, "multiplier": 2,
            "layers": 3, "patch": 2, "channels": 16, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2,
        }),
    ),
    TinyFamily(
        name="hunyuan_image", family="", blocks=(), layers=frozenset(), latent_shape=(64, 6, 10), text_width=20,
        extra=_with_guidance,
        build=partial(built, "HunyuanImage21", {
            "image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None,
            "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
            "depth_single_blocks": 2, "axes_dim": [8, 8], "theta": 256, "qkv_bias": True, "guidance_embed": False,
            "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
            "meanflow_sum": False,
        }),
    ),
    TinyFamily(
        name="omnigen2", family="", blocks=(), layers=frozenset(), latent_shape=(16, 6, 10), text_width=20,
        extra=with_length, settings=unmasked,
        build=partial(built, "Omnigen2", {
            "image_model": "omnigen2", "axes_dim_rope": [4, 4, 4], "axes_lens": [64, 64, 64], "hidden_size": 48,
            "in_channels": 16, "multiple_of": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 3,
            "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": 20, "timestep_scale": 1000.0,
        }),
    ),
    TinyFamily(
        name="ernie", family="", blocks=(), layers=frozenset(), latent_shape=(128, 6, 10), text_width=20,
        build=partial(built, "ErnieImage", {
            "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 48,
            "text_in_dim": 20, "rope_axes_dim": (4, 6, 6),
        }),
    ),
    TinyFamily(
        name="ovis", family="", blocks=(), layers=frozenset(), latent_shape=(16, 6, 10), text_width=20,
        build=partial(built, "Flux", {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": None,
            "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
            "depth_single_blocks": 3, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "guidance_embed": False,
            "yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2],
        }),
    ),
)  # fmt: skip
SAMPLED = (*FAMILIES, *SAMPLED_ONLY)

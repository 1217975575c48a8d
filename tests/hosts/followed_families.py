"""Tiny models of the families that have no file of their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from .sampled_families import SAMPLED, SAMPLED_ONLY, built, unmasked, with_length
from .tiny_families import TinyFamily


def _family(name: str, supported: str, config: dict[str, Any], **of: Any) -> TinyFamily:
    settled = {"latent_shape": (16, 6, 10), "text_width": 20, **of}
    return TinyFamily(
        name=name,
        family=supported.lower(),
        blocks=(),
        layers=frozenset(),
        build=partial(built, supported, config),
        **settled,
    )


def _pooled(generator: torch.Generator) -> dict[str, Any]:
    return {"pooled_output": torch.randn(1, 16, generator=generator)}


def _with_vector(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {"c_crossattn": text, "y": torch.cat([row["pooled_output"] for row in rows])}


def _with_guidance(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    given = {"c_crossattn": text, "guidance": torch.full((len(rows),), 6.0)}
    return {**given, **_with_vector(text, rows)} if rows[0]["pooled_output"] is not None else given


def _with_frames(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {"c_crossattn": text, "attention_mask": torch.cat([row["attention_mask"] for row in rows]), "frame_rate": 25}


def _t5_ids(generator: torch.Generator) -> dict[str, Any]:
    return {
        "pooled_output": None, "t5xxl_ids": torch.randint(0, 100, (7,), generator=generator), "t5xxl_weights": torch.ones(7)
    }  # fmt: skip


_HUNYUAN = {
    "image_model": "hunyuan_video", "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 4,
    "depth_single_blocks": 6, "theta": 256, "qkv_bias": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip


_KANDINSKY = {
    "image_model": "kandinsky5", "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 4,
    "axes_dims": (4, 6, 6), "in_text_dim": 20, "in_text_dim2": 16, "time_dim": 24, "rope_scale_factor": (1.0, 1.0, 1.0),
}  # fmt: skip


_ADAPTER = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_heads": 2}


def _small_anima(config: dict[str, Any], **settings: Any):
    """Anima with a small text adapter, whose size no configuration sets."""
    import comfy.ldm.anima.model as anima

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anima, "LLMAdapter", partial(anima.LLMAdapter, **_ADAPTER))
        return built("Anima", config, **settings)


_LTX2 = {
    "image_model": "ltxav", "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 64,
    "audio_cross_attention_dim": 32, "attention_head_dim": 32, "audio_attention_head_dim": 16,
    "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": 20, "num_layers": 4,
    "positional_embedding_max_pos": [20, 2048, 2048], "audio_positional_embedding_max_pos": [20],
    "connector_attention_head_dim": 32, "connector_num_attention_heads": 2, "connector_num_layers": 1,
    "audio_connector_attention_head_dim": 16, "audio_connector_num_attention_heads": 2,
    "caption_proj_before_connector": True, "apply_gated_attention": True, "cross_attention_adaln": True,
}  # fmt: skip


def _ltx25(config: dict[str, Any], **settings: Any):
    """LTX-2.5: LTX-2's class, with settings that an older one would ignore."""
    from comfy.ldm.lightricks.model import LTXBaseModel

    if "ff_bias" not in inspect.signature(LTXBaseModel).parameters:
        pytest.skip("this ComfyUI has no LTX-2.5")
    return built("LTXAV", config, **settings)


_IDEOGRAM = {
    "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 20,
    "rope_theta": 5000000, "mrope_section": [6, 5, 5], "norm_eps": 1e-5,
}  # fmt: skip


def _small_ideogram(config: dict[str, Any], **settings: Any):
    """Ideogram 4, whose widths ComfyUI does not take from a configuration."""
    import comfy.supported_models

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(comfy.supported_models, "Ideogram4"):
            patch.setattr(comfy.supported_models.Ideogram4, "unet_extra_config", _IDEOGRAM)
        return built("Ideogram4", config, **settings)


_JOINT = {"num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2}
_BY_NAME = {family.name: family for family in SAMPLED_ONLY}

FOLLOWED: tuple[TinyFamily, ...] = (
    _family("auraflow", "AuraFlow", {
        "dim": 64, "n_layers": 5, "n_double_layers": 2, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 20,
        "max_seq": 256, "in_channels": 4, "out_channels": 4,
    }, latent_shape=(4, 6, 10)),
    _family("mage_flow", "MageFlow", {
        "image_model": "mage_flow", "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6), **_JOINT,
    }, latent_shape=(128, 3, 5)),
    _family("lens", "Lens", {
        "image_model": "lens", "patch_size": 1, "in_channels": 128, "out_channels": 128, "enc_hidden_dim": 20,
        "axes_dims_rope": (4, 6, 6), "selected_layer_index": (0, 1), **_JOINT,
    }, latent_shape=(128, 3, 5), text_width=40),
    _family("boogu", "Boogu", {
        "image_model": "boogu", "hidden_size": 48, "num_layers": 6, "num_double_stream_layers": 3, "num_refiner_layers": 1,
        "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 4),
        "axes_lens": (300, 64, 64), "instruction_feat_dim": 20,
    }, settings=unmasked, extra=with_length, lengths=(5, 5, 5)),
    _family("hunyuan_video", "HunyuanVideo", {
        **_HUNYUAN, "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 16,
        "guidance_embed": True, "axes_dim": [4, 6, 6],
    }, frames=True, settings=_pooled, extra=_with_guidance),
    _family("hunyuan_image", "HunyuanImage21", {
        **_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None,
        "guidance_embed": False, "axes_dim": [8, 8],
    }, latent_shape=(64, 3, 5), extra=_with_guidance),
    _family("hunyuan_video15", "HunyuanVideo15", {
        **_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
        "guidance_embed": False, "axes_dim": [4, 6, 6], "use_cond_type_embedding": True, "vision_in_dim": 24,
    }, latent_shape=(32, 3, 5), frames=True, empty=33, extra=_with_guidance),
    _family("kandinsky5", "Kandinsky5Image", {**_KANDINSKY, "visual_embed_dim": 64}, frames=True, settings=_pooled, extra=_with_vector),
    _family("kandinsky5_video", "Kandinsky5", {
        **_KANDINSKY, "visual_embed_dim": 132,
    }, frames=True, empty=17, settings=_pooled, extra=_with_vector),
    TinyFamily(name="anima", family="anima", blocks=(), layers=frozenset(), latent_shape=(16, 6, 10), text_width=64, frames=True, settings=_t5_ids, build=partial(_small_anima, {
        "image_model": "anima", "max_img_h": 24, "max_img_w": 24, "max_frames": 8, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256, "num_blocks": 4, "num_heads": 2,
        "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8, "min_fps": 1, "max_fps": 30,
        "concat_padding_mask": True, "rope_enable_fps_modulation": False, "crossattn_emb_channels": 64,
    })),
    _family("krea2", "Krea2", {
        "image_model": "krea2", "features": 64, "tdim": 16, "txtdim": 20, "heads": 4, "kvheads": 2, "multiplier": 2,
        "layers": 5, "patch": 2, "channels": 16, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2,
    }, text_width=60, frames=True),
    _family("qwen_image21", "QwenImage21", {  # in ComfyUI from 0.37 on
        "image_model": "qwen_image_2.1", "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2,
        "context_in_dim": 20, "axes_dims_rope": (4, 6, 6),
    }, latent_shape=(64, 3, 5)),
    _family("omnigen2", "Omnigen2", {
        "image_model": "omnigen2", "axes_dim_rope": [4, 4, 4], "axes_lens": [64, 64, 64], "hidden_size": 48,
        "in_channels": 16, "multiple_of": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 4,
        "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": 20, "timestep_scale": 1000.0,
    }, settings=unmasked, extra=with_length, lengths=(5, 5, 5)),
    _family("ernie", "ErnieImage", {
        "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 48,
        "text_in_dim": 20, "rope_axes_dim": (4, 6, 6),
    }, latent_shape=(128, 3, 5)),
    replace(
        _family("ideogram4", "Ideogram4", {}, latent_shape=(128, 3, 5)),
        build=partial(_small_ideogram, {"image_model": "ideogram4", "in_channels": 128, "num_layers": 4}),
    ),
    _BY_NAME["hidream"],
    _family("ltxv", "LTXV", {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16,
        "num_attention_heads": 2, "caption_channels": 20, "num_layers": 4,
        "positional_embedding_max_pos": [20, 2048, 2048],
    }, latent_shape=(128, 3, 5), frames=True, settings=unmasked, extra=_with_frames, lengths=(5, 5, 5)),
    _family("ltx2", "LTXAV", _LTX2, latent_shape=(128, 3, 5), frames=True),
    replace(
        _family("ltx25", "LTXAV", _LTX2, latent_shape=(128, 3, 5), frames=True),  # in ComfyUI from 0.32 on
        build=partial(_ltx25, {
            **_LTX2, "ff_bias": False, "audio_ff_bias": False, "use_keyframes_abs_pos_embedding": True
        }),
    ),
    _family("joyimage", "JoyImage", {  # whose heads are never narrower than 128
        "image_model": "joyimage", "hidden_size": 256, "num_attention_heads": 2, "text_dim": 20, "num_layers": 4,
        "mlp_width_ratio": 1.0,
    }, frames=True),
)  # fmt: skip


def family(name: str) -> TinyFamily:
    """Return a family by its name."""
    return next(one for one in FOLLOWED if one.name == name)


PLACED = (
    *SAMPLED,
    *map(family, ("boogu", "lens", "mage_flow", "hunyuan_video", "auraflow")),
    replace(family("kandinsky5"), frames=False),  # as it is sampled: its format has no axis of frames
)
"""All families whose tokens can be given positions."""

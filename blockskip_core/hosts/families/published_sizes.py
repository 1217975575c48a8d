"""Published models at full size, without weights: for counting blocks, parameters and bytes.

Every model is one of the host's own classes on the meta device, where a tensor has a shape and a dtype but no memory.
The sizes are those that the host's ``model_detection`` reads from the published files: number of blocks, widths, text
features; values that it hard-codes for a kind of model (heads, axes, theta) are the same here.

Source: where the host's own classes do not have them as defaults, the configurations published with the files, read on
2026-11-29: AuraFlow's ``transformer/config.json``, ``config_t2i.yaml`` of Kandinsky 5, ``transformer/config.json`` of
JoyAI-Image; those of LTX-Video, HunyuanImage and HunyuanVideo 1.5 from diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.supported_models
import torch

from ...errors import InvalidInputError, UnsupportedModelError


@dataclass(frozen=True)
class PublishedSize:
    """The configuration of a published model.

    Attributes:
        supported: Name of its class in ``comfy.supported_models``.
        config: What ``model_detection`` returns for its file.
    """

    supported: str
    config: Mapping[str, Any]


def _flux2(hidden_size: int, context: int, depth: int, depth_single: int, guidance: bool) -> PublishedSize:
    return PublishedSize(
        "Flux2",
        {
            "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
            "context_in_dim": context, "hidden_size": hidden_size, "mlp_ratio": 3.0, "num_heads": hidden_size // 128,
            "depth": depth, "depth_single_blocks": depth_single, "axes_dim": [32, 32, 32, 32], "theta": 2000,
            "qkv_bias": False, "ops_bias": False, "guidance_embed": guidance, "txt_ids_dims": [3],
            "global_modulation": True, "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0,
        },
    )  # fmt: skip


def _flux1(guidance: bool) -> PublishedSize:
    return PublishedSize(
        "Flux" if guidance else "FluxSchnell",
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
            "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
            "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
            "guidance_embed": guidance, "txt_ids_dims": [],
        },
    )  # fmt: skip


def _wan(dim: int, ffn_dim: int, num_layers: int, channels: int = 16) -> PublishedSize:
    return PublishedSize(
        "WAN21_T2V" if channels == 16 else "WAN22_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": dim, "ffn_dim": ffn_dim,
            "num_heads": dim // 128, "num_layers": num_layers, "in_dim": channels, "out_dim": channels,
            "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
        },
    )  # fmt: skip


def _sd35(depth: int, table_side: int, self_attention: list[int]) -> PublishedSize:
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return PublishedSize(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": depth, "input_size": None,
            "adm_in_channels": 2048, "context_embedder_config": text, "num_patches": table_side**2,
            "pos_embed_max_size": table_side, "pos_embed_scaling_factor": None, "qk_norm": "rms",
            "x_block_self_attn_layers": self_attention,
        },
    )  # fmt: skip


_CHROMA = {
    **{key: value for key, value in _flux1(guidance=False).config.items() if key != "guidance_embed"},
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120,
    "n_layers": 5, "vec_in_dim": None,
}  # fmt: skip
_Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
_MINIMAX_H3 = {
    "image_model": "minimax_h3", "num_layers": 50, "token_refiner_num_layers": 2, "hidden_size": 5376, "latents_dim": 24,
    "audio_latents_dim": 32, "attention_head_dim": 128, "num_attention_heads": 56, "ffn_hidden_size": 14336,
    "text_dim": 5120, "timestep_input_dim": 256, "time_embed_hidden_size": 5376, "time_embed_dim": 2688,
    "rope_inv_freq_len": 16,
}  # fmt: skip
_HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768,
    "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 20, "depth_single_blocks": 40, "theta": 256, "qkv_bias": True, "byt5": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
_HUNYUAN_VIDEO_15 = {
    **_HUNYUAN_VIDEO, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
    "context_in_dim": 3584, "hidden_size": 2048, "num_heads": 16, "depth": 54, "depth_single_blocks": 0, "byt5": True,
    "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
}  # fmt: skip
_KREA_2 = {
    "image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28, "heads": 48, "kvheads": 12,
    "txtlayers": 12, "txtdim": 2560,
}  # fmt: skip
_QWEN_IMAGE_21 = {
    "image_model": "qwen_image_2.1", "num_layers": 32, "attention_head_dim": 128, "num_attention_heads": 32,
    "context_in_dim": 4096,
}  # fmt: skip
_LTX_2 = {"image_model": "ltxav", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
_AURAFLOW = {"max_seq": 4096, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}
_LENS = {
    "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 48, "num_attention_heads": 24,
    "enc_hidden_dim": 2880, "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1, 2, 3),
}  # fmt: skip
_BOOGU = {
    "image_model": "boogu", "hidden_size": 3360, "num_layers": 32, "num_double_stream_layers": 8, "num_refiner_layers": 2,
    "instruction_feat_dim": 4096,
}  # fmt: skip
_HUNYUAN_IMAGE = {
    **_HUNYUAN_VIDEO, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None, "axes_dim": [64, 64],
    "context_in_dim": 3584, "hidden_size": 3584, "num_heads": 28, "byt5": True, "guidance_embed": False,
}  # fmt: skip
_KANDINSKY_5_IMAGE = {
    "image_model": "kandinsky5", "model_dim": 2560, "axes_dims": (32, 48, 48), "rope_scale_factor": (1.0, 1.0, 1.0),
    "time_dim": 512, "ff_dim": 10240, "visual_embed_dim": 64, "num_text_blocks": 2, "num_visual_blocks": 50,
}  # fmt: skip
_KANDINSKY_5_VIDEO = {
    "image_model": "kandinsky5", "model_dim": 1792, "axes_dims": (16, 24, 24), "time_dim": 512, "ff_dim": 7168,
    "visual_embed_dim": 132, "num_text_blocks": 2, "num_visual_blocks": 32,
}  # fmt: skip
_OMNIGEN_2 = {
    "image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None,
    "hidden_size": 2520, "in_channels": 16, "multiple_of": 256, "norm_eps": 1e-5, "num_attention_heads": 21,
    "num_kv_heads": 7, "num_layers": 32, "num_refiner_layers": 2, "out_channels": None, "patch_size": 2,
    "text_feat_dim": 2048, "timestep_scale": 1000.0,
}  # fmt: skip
_JOYIMAGE = {
    "image_model": "joyimage", "in_channels": 16, "hidden_size": 4096, "patch_size": [1, 2, 2], "num_layers": 40,
    "num_attention_heads": 32, "text_dim": 4096,
}  # fmt: skip
_HIDREAM_I1 = {
    "image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096],
    "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [*range(32), *[31] * 16], "num_attention_heads": 20,
    "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 16, "num_single_layers": 32, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": 2048,
}  # fmt: skip
_ANIMA = {
    "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "concat_padding_mask": True,
    "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
    "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 256, "num_blocks": 28, "num_heads": 16,
    "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0, "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
_IDEOGRAM_4 = {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34}


def _ltx_video(num_layers: int, attention_head_dim: int) -> PublishedSize:
    config = {"image_model": "ltxv", "num_layers": num_layers, "attention_head_dim": attention_head_dim}
    return PublishedSize("LTXV", {**config, "cross_attention_dim": 32 * attention_head_dim})


PUBLISHED_SIZES: Mapping[str, PublishedSize] = MappingProxyType(
    {
        "FLUX.1-dev": _flux1(guidance=True),
        "FLUX.1-schnell": _flux1(guidance=False),
        "FLUX.2-dev": _flux2(6144, 15360, depth=8, depth_single=48, guidance=True),
        "FLUX.2-klein-4B": _flux2(3072, 7680, depth=5, depth_single=20, guidance=False),
        "FLUX.2-klein-9B": _flux2(4096, 12288, depth=8, depth_single=24, guidance=False),
        "Qwen-Image": PublishedSize("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}),
        "Qwen-Image-2.1": PublishedSize("QwenImage21", _QWEN_IMAGE_21),  # in ComfyUI from 0.37 on
        "Z-Image": PublishedSize("ZImage", _Z_IMAGE),
        "Wan2.1-T2V-1.3B": _wan(1536, 8960, num_layers=30),
        "Wan2.1-T2V-14B": _wan(5120, 13824, num_layers=40),
        "Wan2.2-TI2V-5B": _wan(3072, 14336, num_layers=30, channels=48),
        "Krea-2": PublishedSize("Krea2", _KREA_2),
        "LTX-2": PublishedSize("LTXAV", _LTX_2),
        "LTX-Video-2B": _ltx_video(28, 64),
        "LTX-Video-13B": _ltx_video(48, 128),
        "HunyuanVideo": PublishedSize("HunyuanVideo", _HUNYUAN_VIDEO),
        "HunyuanVideo-1.5": PublishedSize("HunyuanVideo15", _HUNYUAN_VIDEO_15),
        "HunyuanImage-2.1": PublishedSize("HunyuanImage21", _HUNYUAN_IMAGE),
        "MiniMax-H3": PublishedSize("MiniMaxH3", _MINIMAX_H3),
        "Chroma": PublishedSize("Chroma", _CHROMA),
        "SD3.5-Large": _sd35(38, 192, []),
        "SD3.5-Medium": _sd35(24, 384, list(range(13))),
        "AuraFlow": PublishedSize("AuraFlow", _AURAFLOW),
        "Mage-Flow": PublishedSize("MageFlow", {"image_model": "mage_flow", "in_channels": 128, "num_layers": 12}),
        "Lens": PublishedSize("Lens", _LENS),
        "Boogu-Image": PublishedSize("Boogu", _BOOGU),
        "Kandinsky-5-Image-Lite": PublishedSize("Kandinsky5Image", _KANDINSKY_5_IMAGE),
        "Kandinsky-5-T2V-Lite": PublishedSize("Kandinsky5", _KANDINSKY_5_VIDEO),
        "OmniGen2": PublishedSize("Omnigen2", _OMNIGEN_2),
        "JoyAI-Image-Edit": PublishedSize("JoyImage", _JOYIMAGE),
        "HiDream-I1": PublishedSize("HiDream", _HIDREAM_I1),
        "Anima": PublishedSize("Anima", _ANIMA),
        "Ideogram-4": PublishedSize("Ideogram4", _IDEOGRAM_4),
        "Ernie-Image": PublishedSize("ErnieImage", {"image_model": "ernie"}),
    }
)
META = torch.device("meta")


def is_known(name: str) -> bool:
    """Return whether this ComfyUI has the class of a published model."""
    return hasattr(comfy.supported_models, PUBLISHED_SIZES[name].supported)


def published_model(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    cast_to: torch.dtype | None = None,
    device: torch.device = META,
) -> Any:
    """Return the host's model (a BaseModel) of a published size, with every weight on the meta device.

    Args:
        name: A key of :data:`PUBLISHED_SIZES`.
        dtype: Dtype of the weights; for some families the host keeps a few in float32 regardless.
        cast_to: Dtype that the host casts them to for every use, if it differs.
        device: Another device for the weights, whose values are then uninitialised.

    Raises:
        InvalidInputError: If there is no such name.
        UnsupportedModelError: If this ComfyUI is older than the model.
    """
    if name not in PUBLISHED_SIZES:
        raise InvalidInputError(f"Expected one of {', '.join(PUBLISHED_SIZES)}, got {name!r}.")
    size = PUBLISHED_SIZES[name]
    if not is_known(name):
        raise UnsupportedModelError(
            f"This ComfyUI has no {size.supported}, so it does not know {name}. Update ComfyUI."
        )
    supported = getattr(comfy.supported_models, size.supported)(dict(size.config))
    supported.custom_operations = None
    supported.set_inference_dtype(dtype, cast_to)
    model = supported.get_model({}, "", device=device)
    for layer in model.diffusion_model.modules():
        if any(parameter.device.type != device.type for parameter in layer.parameters(recurse=False)):
            layer.to(device)  # the host creates a table of HunyuanVideo 1.5 without a device
    return model

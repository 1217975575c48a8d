"""Whole pipelines of tiny random components of diffusers' and transformers' own classes, with tokenizers made here."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .tiny_models import FLUX, FLUX2, QWEN_IMAGE, SANA, TEXT_WIDTH, WAN, Z_IMAGE

WORDS = ("a", "photo", "of", "sks", "dog", "cat", "on", "grass", "assistant", "user", "system")
VOCABULARY = 99
MANY_TOKENS = 2048  # at most in a text
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer() -> Any:
    """A tokenizer that knows a few words."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=77, chat_template=CHAT,
    )  # fmt: skip


def _clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=12, eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=TEXT_WIDTH, d_kv=10, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config)


def _language_model(config_class: str, model_class: str, layers: int = 3, width: int = TEXT_WIDTH) -> Any:
    config = getattr(transformers, config_class)(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=10, max_position_embeddings=MANY_TOKENS, pad_token_id=0, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return getattr(transformers, model_class)(config)


def _vae(blocks: int, **settings: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=(4,) * blocks, layers_per_block=1,
        latent_channels=4, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5, **settings,
    )  # fmt: skip


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flux() -> Any:
    """A FLUX.1 whose tokens are 32 px wide, so that pictures of the usual sizes are small."""
    return diffusers.FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=_vae(5), text_encoder=_clip(), tokenizer=tokenizer(),
        text_encoder_2=_t5(), tokenizer_2=tokenizer(), transformer=FLUX.build(),
    )  # fmt: skip


def flux2() -> Any:
    """A FLUX.2 Klein."""
    vae = diffusers.AutoencoderKLFlux2(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 4), layers_per_block=1, latent_channels=2,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    width = TEXT_WIDTH // 2  # two layers are joined below
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=vae, tokenizer=tokenizer(),
        text_encoder=_language_model("Qwen3Config", "Qwen3ForCausalLM", layers=28, width=width),
        transformer=FLUX2.build(joint_attention_dim=3 * width, guidance_embeds=False),
    )  # fmt: skip


def qwen_image() -> Any:
    """A Qwen-Image."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH
        },
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=vae, tokenizer=tokenizer(), transformer=QWEN_IMAGE.build(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
    )  # fmt: skip


def z_image() -> Any:
    """A Z-Image."""
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0), vae=_vae(2), tokenizer=tokenizer(), transformer=Z_IMAGE.build(),
        text_encoder=_language_model("Qwen3Config", "Qwen3Model"),
    )  # fmt: skip


def wan() -> Any:
    """A Wan 2.1."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0], scale_factor_spatial=4,
        scale_factor_temporal=2,
    )  # fmt: skip
    return diffusers.WanPipeline(
        scheduler=_flow(shift=5.0), vae=vae, tokenizer=tokenizer(), text_encoder=_t5(), transformer=WAN.build(),
    )  # fmt: skip


def wan_pair() -> Any:
    """A Wan 2.2 A14B: two transformers share the noise levels."""
    pipeline = build("wan")
    return diffusers.WanPipeline(
        **{**pipeline.components, "transformer_2": WAN.build(seed=1)}, boundary_ratio=0.9,
    )  # fmt: skip


def sana() -> Any:
    """A SANA with DC-AE's 32 px per cell."""
    channels = (4, 4, 4, 4, 4, 4)
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        scheduler=_flow(shift=3.0), vae=vae, tokenizer=tokenizer(), transformer=SANA.build(),
        text_encoder=_language_model("Gemma2Config", "Gemma2Model"),
    )  # fmt: skip


PIPELINES = {
    "flux": flux, "flux2": flux2, "qwen_image": qwen_image, "lumina2": z_image, "wan": wan, "sana": sana,
}  # fmt: skip


def build(name: str) -> Any:
    """The pipeline of a family, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline

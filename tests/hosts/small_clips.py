"""Small CLIPs and a small U-Net of ComfyUI's own classes, with random weights and its own tokenizers."""

from __future__ import annotations

import base64
import io
import json
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

WIDTH = 16  # of every encoder: what tiny_flux takes
SMALL_CLIP = {"num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
SMALL_T5 = {"num_layers": 1, "d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_heads": 2}
SMALL_QWEN = {
    "num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
OPTIONS = {
    "clip_l_model_config": SMALL_CLIP, "clip_g_model_config": SMALL_CLIP, "t5xxl_model_config": SMALL_T5,
    "qwen25_7b_model_config": SMALL_QWEN, "qwen3_4b_model_config": SMALL_QWEN, "qwen25_3b_model_config": SMALL_QWEN,
    "umt5xxl_model_config": SMALL_T5, "gemma2_2b_model_config": SMALL_QWEN, "llama_model_config": {**SMALL_QWEN, "num_hidden_layers": 4},
}  # fmt: skip
OWN_OPTIONS = {  # the first three read layers up to the 27th, 30th and 35th
    "FLUX.2 Klein": {"qwen3_4b_model_config": {**SMALL_QWEN, "num_hidden_layers": 28}},
    "FLUX.2": {"mistral3_24b_model_config": {**SMALL_QWEN, "num_hidden_layers": 31}},
    "Krea 2": {"qwen3vl_4b_model_config": {**SMALL_QWEN, "num_hidden_layers": 36}},
    "LTX-2": {"_model_config": {**SMALL_QWEN, "num_hidden_layers": 2}},
}
UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "adm_in_channels": None, "in_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "num_heads": 4,
    "transformer_depth": [1, 1], "channel_mult": [1, 2], "transformer_depth_middle": 1, "num_head_channels": -1,
    "use_linear_in_transformer": False, "context_dim": WIDTH, "transformer_depth_output": [1, 1, 1, 1],
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip


def _classes(family: str) -> tuple[Any, Any]:
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.hunyuan_video
    import comfy.text_encoders.krea2
    import comfy.text_encoders.lt
    import comfy.text_encoders.lumina2
    import comfy.text_encoders.omnigen2
    import comfy.text_encoders.pixart_t5
    import comfy.text_encoders.qwen_image
    import comfy.text_encoders.sd3_clip
    import comfy.text_encoders.wan
    import comfy.text_encoders.z_image

    encoders = comfy.text_encoders
    return {
        "SD1.5": lambda: (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        "SDXL": lambda: (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "SD3.5": lambda: (encoders.sd3_clip.sd3_clip(True, True, False), encoders.sd3_clip.SD3Tokenizer),
        "FLUX.1": lambda: (encoders.flux.flux_clip(torch.float32), encoders.flux.FluxTokenizer),
        "Z-Image": lambda: (encoders.z_image.te(torch.float32), encoders.z_image.ZImageTokenizer),
        "Qwen-Image": lambda: (encoders.qwen_image.te(torch.float32), encoders.qwen_image.QwenImageTokenizer),
        "Wan": lambda: (encoders.wan.te(torch.float32), encoders.wan.WanT5Tokenizer),
        "Lumina 2": lambda: (encoders.lumina2.te(torch.float32), encoders.lumina2.LuminaTokenizer),
        "OmniGen2": lambda: (encoders.omnigen2.te(torch.float32), encoders.omnigen2.Omnigen2Tokenizer),
        "FLUX.2 Klein": lambda: (encoders.flux.klein_te(torch.float32), encoders.flux.KleinTokenizer),
        "Chroma": lambda: (encoders.pixart_t5.pixart_te(torch.float32), encoders.pixart_t5.PixArtTokenizer),
        "HunyuanVideo": lambda: (
            encoders.hunyuan_video.hunyuan_video_clip(torch.float32),
            encoders.hunyuan_video.HunyuanVideoTokenizer,
        ),
        "FLUX.2": lambda: (encoders.flux.flux2_te(torch.float32), encoders.flux.Flux2Tokenizer),
        "Krea 2": lambda: (encoders.krea2.te(torch.float32), encoders.krea2.Krea2Tokenizer),
        "LTX-2": lambda: (encoders.lt.ltxav_te(torch.float32), encoders.lt.LTXAVGemmaTokenizer),
    }[family]()


# SD3.5 without T5, as many load it; with it, ComfyUI joins both at T5's full width.
FAMILIES = (
    "SD1.5", "SDXL", "SD3.5", "FLUX.1", "Z-Image", "Qwen-Image", "Wan", "Lumina 2", "OmniGen2", "FLUX.2 Klein", "Chroma",
    "HunyuanVideo", "FLUX.2", "Krea 2", "LTX-2",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz, "


@lru_cache(maxsize=1)
def vocabularies() -> dict[str, torch.Tensor]:
    """Return a small vocabulary for the tokenizers that ComfyUI reads from a model's file: a token for each letter."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS]), model_writer=made, model_type="char", vocab_size=len(LETTERS) + 4, pad_id=0,
        eos_id=1, bos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return {
        "spiece_model": torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8),
        "tekken_model": _tekken_file(),
    }


SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


def _tekken(data: Any) -> dict[str, Any]:
    """Return what ComfyUI makes of Mistral's vocabulary: here a token for each byte, after the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return {"tokenizer_object": made, "legacy": False}


def _tekken_file() -> torch.Tensor:
    """Return such a vocabulary as it is in a model's file."""
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    special = [{"rank": rank, "token_str": name} for rank, name in enumerate(SPECIAL)]
    config = {"default_num_special_tokens": len(SPECIAL), "default_vocab_size": len(SPECIAL) + len(vocab)}
    made = json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()
    return torch.frombuffer(bytearray(made), dtype=torch.uint8)


def _mistral_vocabulary() -> AbstractContextManager[Any]:
    """Return a context in which ComfyUI has a small vocabulary of Mistral.

    ComfyUI 0.30 reads it by a class of transformers, whose arguments have changed since; 0.33 reads it itself.
    """
    import comfy.text_encoders.flux as host

    return nullcontext() if hasattr(host, "from_tekken_json") else patch.object(host, "load_mistral_tokenizer", _tekken)


def _without_pictures(encoder: torch.nn.Module) -> None:
    """Replace what these tests do not need and is large: encoders of pictures, and LTX-2's projection at full width."""
    for module in list(encoder.modules()):
        for name in ("visual", "vision_model", "multi_modal_projector"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
    if hasattr(encoder, "text_embedding_projection"):
        encoder.text_embedding_projection = torch.nn.Linear(3 * WIDTH, WIDTH, bias=False)


@lru_cache(maxsize=len(FAMILIES))
@torch.inference_mode()
def small_clip(family: str, embeddings: str) -> Any:
    """Return a CLIP of a family with random weights, WIDTH numbers a token; the same one for all tests of a session."""
    import comfy.sd

    encoder, tokenizer = _classes(family)
    nowhere = {"initial_device": torch.device("meta")}  # some are large at first
    with _mistral_vocabulary():
        clip = comfy.sd.CLIP(
            SimpleNamespace(params={}, clip=encoder, tokenizer=tokenizer), embedding_directory=[embeddings],
            model_options={**OPTIONS, **OWN_OPTIONS.get(family, {}), **nowhere, "dtype": torch.float32},
            disable_dynamic=True, tokenizer_data=vocabularies(),
        )  # fmt: skip
    _without_pictures(clip.cond_stage_model)
    clip.cond_stage_model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (
            0.05 if "embed" in name or "shared" in name else 0.2
        )
        parameter.copy_(values + (parameter.ndim == 1 and name.endswith("weight")))
    return clip


@torch.inference_mode()
def small_unet(prediction: str = "EPS", context: int = WIDTH) -> Any:
    """Return a MODEL around a random U-Net like SD1.5's, for latents (B, 4, 8, 8)."""
    import comfy.model_base
    import comfy.supported_models

    supported = comfy.supported_models.SD15({**UNET, "context_dim": context})
    return _with_random_weights(supported, comfy.model_base.BaseModel, comfy.model_base.ModelType[prediction])


@torch.inference_mode()
def small_sdxl() -> Any:
    """Return a MODEL around a random U-Net like SDXL's: the text of two encoders, and pooled text with six sizes as ``y``."""
    import comfy.model_base
    import comfy.supported_models

    vector = WIDTH + 6 * 256  # the host's embedding of a size has 256 numbers
    changes = {"context_dim": 2 * WIDTH, "adm_in_channels": vector, "num_classes": "sequential"}
    changes["model_channels"] = 64  # one head, which the host makes 64 wide
    supported = comfy.supported_models.SDXL({**UNET, **changes})
    return _with_random_weights(supported, comfy.model_base.SDXL, comfy.model_base.ModelType.EPS)


def _with_random_weights(supported: Any, kind: Any, prediction: Any) -> Any:
    import comfy.model_management
    import comfy.model_patcher

    supported.custom_operations = None
    supported.set_inference_dtype(torch.float32, None)
    model = kind(supported, model_type=prediction, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.diffusion_model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * max(1, parameter[0].numel()) ** -0.5
        parameter.copy_(1.0 + 0.1 * values if parameter.ndim == 1 and name.endswith("weight") else values)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))

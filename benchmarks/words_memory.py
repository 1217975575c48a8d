"""What learning a word needs, counted on published models at full size, without weights and without a GPU.

Part of the benchmark ``words``. One step of the real loop runs on torch's ``meta`` device (``hosts/words/counted_words.py``).
Weights in a format are counted as the files in that format store them: linear layers in it, everything else in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.flux
import torch
from blockskip_pack.blockskip_core.accounting.weight_formats import predicted_bytes
from blockskip_pack.blockskip_core.hosts.families.published_sizes import published_model
from blockskip_pack.blockskip_core.hosts.words.captions import WordCaptions
from blockskip_pack.blockskip_core.hosts.words.counted_words import META, WordNeeds, word_needs
from blockskip_pack.blockskip_core.hosts.words.encoders import encoder_of, tokenizers_of
from blockskip_pack.blockskip_core.zoodip.word import WordLayout, WordPart

CPU, HALF = torch.device("cpu"), torch.float16
WHERE = META  # where weights are
CAPTION = "a photo of {word} on the grass"
UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "in_channels": 4, "model_channels": 320, "num_head_channels": -1, "transformer_depth_middle": 1,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SD15 = {
    **UNET, "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768,
    "num_heads": 8, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip
SDXL = {
    **UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
    "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A published model with its text encoders.

    Attributes:
        name: Readable name.
        side, channels: Of a picture in pixels, and of its latent.
        formats: Those of the model to count.
        text: Formats of the text encoders, for each.
        limit: GiB that are wanted; None for the model's own weights plus 1 GiB.
    """

    name: str
    side: int
    channels: int
    formats: tuple[str, ...]
    text: tuple[str, ...]
    limit: float | None = None


SUBJECTS = (
    Subject("SD1.5", 512, 4, ("off", "int8"), ("off", "int8"), 2.37e9 / 2**30),
    Subject("SDXL", 1024, 4, ("off", "int8"), ("off", "int8"), 5e9 / 2**30),
    Subject("FLUX.1-dev", 512, 16, ("fp8", "4-bit"), ("fp8", "fp8")),
    Subject("FLUX.1-dev", 1024, 16, ("fp8", "4-bit"), ("fp8", "fp8")),
)
ROWS = (1, 3, 8)


def unet(kind: str, config: dict[str, Any]) -> Any:
    """Return one of the host's U-Nets at full size, without weights."""
    supported = getattr(comfy.supported_models, kind)(dict(config))
    supported.custom_operations = None
    supported.set_inference_dtype(HALF, None)
    return supported.get_model({}, "", device=WHERE)


def model_of(name: str) -> Any:
    """Return a MODEL without weights."""
    made = {
        "SD1.5": lambda: unet("SD15", SD15), "SDXL": lambda: unet("SDXL", SDXL),
        "FLUX.1-dev": lambda: published_model("FLUX.1-dev", torch.float8_e4m3fn, torch.bfloat16, WHERE),
    }[name]()  # fmt: skip
    return comfy.model_patcher.ModelPatcher(made, load_device=CPU, offload_device=CPU)


def clip_of(name: str, dtype: torch.dtype) -> Any:
    """Return its text encoders without weights."""
    encoder, tokenizer = {
        "SD1.5": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        "SDXL": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "FLUX.1-dev": (comfy.text_encoders.flux.flux_clip(dtype), comfy.text_encoders.flux.FluxTokenizer),
    }[name]
    options = {"dtype": HALF, "initial_device": WHERE, "load_device": CPU, "offload_device": CPU}
    return comfy.sd.CLIP(
        SimpleNamespace(params={}, clip=encoder, tokenizer=tokenizer), embedding_directory=[], model_options=options,
        disable_dynamic=True,
    )  # fmt: skip


def layout_of(clip: Any) -> WordLayout:
    """Return the shape of a word of one token."""
    widths = {
        tokenizer.embedding_key: encoder_of(clip, name).transformer.get_input_embeddings().weight.shape[1]
        for name, tokenizer in tokenizers_of(clip).items()
    }
    return WordLayout([WordPart(name, 1, width, 0.02) for name, width in widths.items()])


def counted(subject: Subject, model: Any, clip: Any, rows: int) -> WordNeeds:
    """Count a step with so many words as one batch; weights in 16 bits, or in 8 for FLUX.1."""
    layout = layout_of(clip)
    captions = WordCaptions(clip, [CAPTION], layout.parts)
    side = subject.side // 8
    return word_needs(model, captions, layout, (subject.channels, side, side), rows)


def stored(module: torch.nn.Module, weight_format: str) -> int:
    """Return the bytes of a module's weights in a format."""
    return predicted_bytes(module.to(HALF), weight_format)


def rows() -> Iterator[dict[str, Any]]:
    """Yield a row per model, format and number of words in one batch."""
    for subject in SUBJECTS:
        model, clip = model_of(subject.name), clip_of(subject.name, torch.float8_e4m3fn)
        needs = {number: counted(subject, model, clip, number) for number in ROWS}
        text = clip_of(subject.name, HALF).cond_stage_model
        for own, of_text in zip(subject.formats, subject.text, strict=True):
            weights = {"model_weights": stored(model.model.diffusion_model, own), "text_weights": stored(text, of_text)}
            limit = subject.limit or weights["model_weights"] / 2**30 + 1.0
            for number in ROWS:
                found = replace(needs[number], **weights)
                yield {
                    "model": subject.name, "side": subject.side, "format": own, "text_format": of_text, "rows": number,
                    **asdict(found), "together": found.together, "in_turns": found.in_turns,
                    "limit": round(limit * 2**30),
                }  # fmt: skip

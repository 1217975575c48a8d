"""Every family as a tiny random model of diffusers' own classes, called by hand as its pipeline calls it.

The calls (``plain``) are an independent reference for the host's: packing and positions are the pipelines' own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.hosts.diffusers import DiffusersDit
from torch import Tensor

from ...core.plain_dit import MemorySource, lora_for, needed, schedule, selection, train

PLAN = schedule((0.3, 0.9, 0.55, 0.7), (0, 2, 1, 2))
TEXT_LENGTHS = (5, 5, 3)  # of the captions
TEXT_WIDTH = 20
GRID = (3, 5)  # tokens


@dataclass(frozen=True)
class TinyModel:
    """A family's tiny model and what fits it.

    Attributes:
        name: Its family.
        model_class: Name of diffusers' class.
        settings: Its configuration.
        latent_shape: (C, H, W) of :data:`GRID` tokens.
        plain: (model, noisy, sigmas, texts joined along the batch axis) -> velocity, as the pipeline computes it.
        num_blocks: Number of blocks.
        num_layers: Number of linear layers of the first block that get an adapter.
        num_img, num_txt: Tokens in the stream, for a text of three tokens.
        masks: Whether texts come with a mask.
    """

    name: str
    model_class: str
    settings: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    plain: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    num_blocks: int
    num_layers: int
    num_img: int = 15
    num_txt: int = 3
    text_key: str = "encoder_hidden_states"
    masks: bool = False

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        """A random model."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(diffusers, self.model_class)(**{**self.settings, **settings}).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("pad_token"):  # zeros otherwise
                        parameter.normal_()
        return model if dtype == torch.float32 else model.to(dtype)

    def captions(self, lengths: Sequence[int] = TEXT_LENGTHS, seed: int = 1) -> list[dict[str, Tensor]]:
        """Encoded texts of these lengths."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for length in lengths:
            text = {self.text_key: torch.randn(1, length, TEXT_WIDTH, generator=generator)}
            if self.name == "flux":
                text["pooled_projections"] = torch.randn(1, 12, generator=generator)
            if self.masks:
                text["encoder_attention_mask"] = torch.tensor([[1] * (length - 2) + [0, 0]])
            made.append(text)
        return made

    def hosted(self, model: Any = None, **settings: Any) -> DiffusersDit:
        """The model as a SkippableDit."""
        return DiffusersDit(model or self.build(), self.captions(), **settings)

    def chosen(self, front: int, back: int, tail: int = 0):
        """A selection."""
        return selection(front, back, self.num_blocks, tail)

    def clean_latents(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Clean latents, shape (4, C, H, W)."""
        return torch.randn(4, *self.latent_shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def whole(self, model: Any, clean: Tensor, draws: Sequence[int]) -> Tensor:
        """The clean estimate of the whole model, with the kernels of frozen weights.

        torch multiplies by a weight that requires a gradient in another order, even where none is computed.
        """
        model.requires_grad_(False)
        try:
            return self.estimate(model, clean, draws)
        finally:
            model.requires_grad_(True)

    def estimate(self, model: Any, clean: Tensor, draws: Sequence[int]) -> Tensor:
        """The clean estimate of the whole model, called by hand."""
        noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
        rows = [self.captions()[PLAN[draw].caption] for draw in draws]
        text = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        text = {name: x.to(clean.dtype) if x.is_floating_point() else x for name, x in text.items()}
        return noisy - sigmas.view(-1, 1, 1, 1) * self.plain(model, noisy, sigmas, text)

    def lora(self, dit: DiffusersDit, spans, **settings: Any):
        """Adapters on the attention and MLP layers of the kept blocks."""
        settings = {"dtype": torch.promote_types(dit.dtype, torch.float32), "size": 0.05, **settings}
        return lora_for(dit, spans, wanted=dit.lora_layers(spans), **settings)

    def run(self, dit: DiffusersDit, spans, *, source=None, adapters=None, on_step=None, **settings: Any):
        """Train; return (result, gradients of the last step, adapters)."""
        clean = self.clean_latents(torch.promote_types(dit.dtype, torch.float32))
        source = source or MemorySource(dit, spans, PLAN, clean, needed(len(PLAN), **settings))
        adapters = adapters or self.lora(dit, spans)
        result, gradients = train(dit, spans, source, adapters, plan=PLAN, clean=clean, on_step=on_step, **settings)
        return result, gradients, adapters


def replayed(dit: DiffusersDit, spans, residuals, clean: Tensor, draws: Sequence[int], adapters=None) -> Tensor:
    """The skipping model's output, with the LoRA if there is one."""
    stand_ins = SkippingModel(dit, spans, checkpointed=False, folded=False)
    noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        stand_ins.replay(residuals.__getitem__, draws, None)
        attached = adapters.attached(stand_ins.linears(), dit.weight_for_backward) if adapters else nullcontext()
        with attached:
            return denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])


# --- the families ------------------------------------------------------------------------------------------------


def _flux(model, noisy, sigmas, text):
    batch, channels, rows, columns = noisy.shape
    pipeline = diffusers.FluxPipeline
    output = model(
        hidden_states=pipeline._pack_latents(noisy, batch, channels, rows, columns),
        encoder_hidden_states=text["encoder_hidden_states"],
        pooled_projections=text["pooled_projections"],
        timestep=sigmas,
        guidance=torch.full((batch,), 3.5) if model.config.guidance_embeds else None,
        img_ids=pipeline._prepare_latent_image_ids(batch, rows // 2, columns // 2, "cpu", noisy.dtype),
        txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, dtype=noisy.dtype),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(output, rows * 8, columns * 8, 8)


def _flux2(model, noisy, sigmas, text):
    pipeline = diffusers.Flux2Pipeline
    output = model(
        hidden_states=pipeline._pack_latents(noisy),
        encoder_hidden_states=text["encoder_hidden_states"],
        timestep=sigmas,
        guidance=torch.full((len(noisy),), 4.0) if model.config.guidance_embeds else None,
        img_ids=pipeline._prepare_latent_ids(noisy),
        txt_ids=pipeline._prepare_text_ids(text["encoder_hidden_states"]),
        return_dict=False,
    )[0]
    return output.permute(0, 2, 1).reshape(noisy.shape)


def _qwen(model, noisy, sigmas, text):
    batch, channels, rows, columns = noisy.shape
    pipeline = diffusers.QwenImagePipeline
    output = model(
        hidden_states=pipeline._pack_latents(noisy, batch, channels, rows, columns),
        encoder_hidden_states=text["encoder_hidden_states"],
        timestep=sigmas,
        img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(output, rows * 8, columns * 8, 8)[:, :, 0]


def _z_image(model, noisy, sigmas, text):
    time = (1000 - sigmas * 1000) / 1000
    output = model(list(noisy.unsqueeze(2)), time, list(text["cap_feats"]), return_dict=False)[0]
    return -torch.stack([x.squeeze(1) for x in output])


def _wan(model, noisy, sigmas, text):
    return model(noisy.unsqueeze(2), sigmas * 1000, text["encoder_hidden_states"], return_dict=False)[0].squeeze(2)


def _sana(model, noisy, sigmas, text):
    return model(noisy, timestep=sigmas * 1000, return_dict=False, **text)[0]


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

FLUX = TinyModel(
    "flux", "FluxTransformer2DModel",
    {**_HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": TEXT_WIDTH,
     "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)},
    (4, 6, 10), _flux, num_blocks=5, num_layers=12,
)  # fmt: skip
FLUX2 = TinyModel(
    "flux2", "Flux2Transformer2DModel",
    {**_HEADS, "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": TEXT_WIDTH,
     "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    (8, 3, 5), _flux2, num_blocks=5, num_layers=12,
)  # fmt: skip
QWEN_IMAGE = TinyModel(
    "qwen_image", "QwenImageTransformer2DModel",
    {**_HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": TEXT_WIDTH,
     "axes_dims_rope": (4, 6, 6)},
    (4, 6, 10), _qwen, num_blocks=4, num_layers=12,
)  # fmt: skip
Z_IMAGE = TinyModel(
    "lumina2", "ZImageTransformer2DModel",
    {"in_channels": 4, "dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
     "cap_feat_dim": TEXT_WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]},
    (4, 6, 10), _z_image, num_blocks=4, num_layers=7, num_img=32, num_txt=32, text_key="cap_feats",
)  # fmt: skip
WAN = TinyModel(
    "wan", "WanTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH,
     "freq_dim": 16, "ffn_dim": 40, "num_layers": 4, "rope_max_seq_len": 32},
    (4, 6, 10), _wan, num_blocks=4, num_layers=10, num_txt=0,
)  # fmt: skip
SANA = TinyModel(
    "sana", "SanaTransformer2DModel",
    {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_cross_attention_heads": 2,
     "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH},
    (4, 3, 5), _sana, num_blocks=4, num_layers=8, num_txt=0, masks=True,
)  # fmt: skip
FAMILIES = (FLUX, FLUX2, QWEN_IMAGE, Z_IMAGE, WAN, SANA)

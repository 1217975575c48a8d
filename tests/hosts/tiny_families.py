"""Every supported family as a tiny random model of ComfyUI's own classes, and runs of it.

A family is one entry of ``FAMILIES``. Its model's arguments are written by hand here (``extra``), as an independent
reference for the package's conversion from CONDITIONING to arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from blockskip_pack.blockskip_core.blocks.skipping_model import SkippingModel
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from torch import Tensor

from ..core.plain_dit import MemorySource, all_blocks, lora_for, needed, schedule, selection, train
from .tiny_flux import tiny_flux

PLAN = schedule((0.3, 0.9, 0.55, 0.7), (0, 2, 1, 2))
TEXT_LENGTHS = (5, 5, 3)  # of the captions


def tiny_model(
    supported: str, config: dict[str, Any], *, dtype: torch.dtype = torch.float32,
    cast_to: torch.dtype | None = None, seed: int = 0, operations: Any = None,
):  # fmt: skip
    """Return a ModelPatcher around a random model of a class of ``comfy.supported_models``.

    With another pack's ``operations`` its layers have no weights yet.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    described = getattr(comfy.supported_models, supported)(dict(config))
    described.custom_operations = operations
    described.set_inference_dtype(dtype, cast_to)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():  # as ComfyUI's loaders do
        model = described.get_model({}, "", device=torch.device("cpu"))
        for name, tensor in model.diffusion_model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) * max(tensor[0].numel(), 1) ** -0.5
            is_norm = tensor.ndim == 1 and name.endswith(("weight", "scale"))
            tensor.copy_(1.0 + 0.1 * noise if is_norm else noise)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny model and what fits it.

    Attributes:
        name: For the names of tests.
        family: Its name in its adapter.
        build: Creates a ModelPatcher; takes ``dtype``, ``cast_to`` and ``seed``.
        blocks: Names of all blocks in execution order.
        latent_shape: (C, H, W); about fifteen image tokens.
        text_width: Features of a text token.
        settings: Generator -> settings of a CONDITIONING apart from its text.
        extra: (text (B, L, text_width), settings of each row) -> arguments of ``apply_model`` by name.
        frames: Whether ComfyUI's latents have a frame axis.
        empty: Channels of the empty picture and mask that ComfyUI gives the model beside the latents.
        text_outputs: Layers of a block that only affect its text output.
        layers: Linear layers of the first block that get an adapter.
        num_text: Text tokens in the stream for a text of three tokens.
        num_img: Image tokens in the stream.
    """

    name: str
    family: str
    build: Callable[..., Any]
    blocks: tuple[str, ...]
    latent_shape: tuple[int, int, int]
    text_width: int
    layers: frozenset[str]
    settings: Callable[[torch.Generator], dict[str, Any]] = lambda generator: {"pooled_output": None}
    extra: Callable[[Tensor, Sequence[dict]], dict[str, Any]] = lambda text, rows: {"c_crossattn": text}
    frames: bool = False
    empty: int = 0
    text_outputs: frozenset[str] = frozenset()
    num_text: int = 3
    num_img: int = 15
    lengths: tuple[int, ...] = field(default=TEXT_LENGTHS)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def chosen(self, front: int, back: int, tail: int = 0):
        """A selection."""
        return selection(front, back, self.num_blocks, tail)

    def captions(self, lengths: Sequence[int] = (5,), seed: int = 1, **settings: Any) -> list[list]:
        """Single conditionings with these numbers of text tokens."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for length in lengths:
            own = {**self.settings(generator), **settings}
            made.append([[torch.randn(1, length, self.text_width, generator=generator), own]])
        return made

    def hosted(self, patcher, lengths: Sequence[int] | None = None, **settings: Any):
        """The MODEL as a SkippableDit with captions of these lengths."""
        from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

        return HostedDit(patcher, self.captions(lengths or self.lengths, **settings), self.latent_shape)

    def plain_forward(self, patcher, noisy: Tensor, sigmas: Tensor, conditionings: Sequence[list]) -> Tensor:
        """The clean estimate of the MODEL as a ComfyUI sampler gets it."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])
        text = torch.cat([conditioning[0][0] for conditioning in conditionings])
        arguments = self.extra(text, [conditioning[0][1] for conditioning in conditionings])
        channels = patcher.model.latent_format.latent_channels
        latents = noisy.unflatten(1, (channels, -1)) if self.frames else noisy
        if self.empty:
            arguments["c_concat"] = torch.zeros(len(latents), self.empty, *latents.shape[2:], dtype=latents.dtype)
        with torch.inference_mode():
            denoised = patcher.model.apply_model(latents, sigmas, transformer_options={}, **arguments).clone()
        return denoised.flatten(1, 2) if self.frames else denoised

    def clean_latents(self, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
        """Clean latents, shape (count, C, H, W)."""
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(5)).to(dtype)

    def full_forward(self, dit, clean: Tensor, draws: Sequence[int], plan=PLAN) -> Tensor:
        """The MODEL's own clean estimate of some draws."""
        noisy, _, sigmas = noisy_batch(plan, clean, draws)
        return self.plain_forward(dit.patcher, noisy, sigmas, [dit._captions[plan[draw].caption] for draw in draws])

    def lora(self, dit, spans, **settings: Any):
        """Adapters on the attention and MLP layers of the kept blocks."""
        settings = {"dtype": torch.float32, "size": 0.05, **settings}
        layers = dit.lora_layers(spans, "attention and mlp")
        return lora_for(dit, spans, wanted=layers.__contains__, **settings)

    def run(self, patcher, spans, *, source=None, on_step=None, adapters=None, **settings: Any):
        """Train; return (result, gradients of the last step, adapters)."""
        dit, clean = self.hosted(patcher), self.clean_latents()
        source = source or MemorySource(dit, spans, PLAN, clean, needed(len(PLAN), **settings))
        adapters = adapters or self.lora(dit, spans)
        result, gradients = train(dit, spans, source, adapters, plan=PLAN, clean=clean, on_step=on_step, **settings)
        return result, gradients, adapters


def precomputed(dit, spans, clean, draws, plan=PLAN, **options: Any):
    """Residuals of some draws, computed with all blocks loaded at once."""
    return precompute_residuals(dit, plan, clean, spans, draws, **{"room": all_blocks(dit), **options})


def replayed(dit, spans, residuals, clean, draws, adapters=None):
    """The skipping model's output, with the LoRA if there is one."""
    stand_ins = SkippingModel(dit, spans, checkpointed=False, folded=False)
    noisy, _, sigmas = noisy_batch(PLAN, clean, draws)
    with torch.no_grad(), dit.running(stand_ins.modules) as denoise:
        stand_ins.replay(residuals.__getitem__, draws, None)
        if adapters is None:
            return denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])
        with adapters.attached(stand_ins.linears(), dit.weight_for_backward):
            return denoise(noisy, sigmas, [PLAN[draw].caption for draw in draws])


# --- the families ------------------------------------------------------------------------------------------------


def _pooled(generator: torch.Generator) -> dict[str, Any]:
    return {"pooled_output": torch.randn(1, 16, generator=generator)}


def _with_pooled(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    given = {"c_crossattn": text, "y": torch.cat([row["pooled_output"] for row in rows])}
    if "guidance" in rows[0]:
        given["guidance"] = torch.tensor([row["guidance"] for row in rows])
    return given


def _flux2_text(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    filled = torch.cat((torch.zeros(len(text), 512 - text.shape[1], text.shape[2]), text), dim=1)
    return {"c_crossattn": filled, "guidance": torch.tensor([row.get("guidance", 3.5) for row in rows])}


def _chroma_text(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {"c_crossattn": text, "guidance": torch.zeros(len(rows))}


def _lumina_text(text: Tensor, rows: Sequence[dict]) -> dict[str, Any]:
    return {"c_crossattn": text, "num_tokens": text.shape[1]}


def _numbered(**lists: int) -> tuple[str, ...]:
    return tuple(f"{name}.{index}" for name, count in lists.items() for index in range(count))


_FLUX_LAYERS = frozenset(f"{s}_{n}" for s in ("img", "txt") for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))
_FLUX_TEXT_OUTPUTS = frozenset({"txt_attn.proj", "txt_mlp.0", "txt_mlp.2"})

FLUX = TinyFamily(
    name="flux", family="flux", build=tiny_flux, blocks=_numbered(double_blocks=2, single_blocks=4),
    latent_shape=(4, 6, 10), text_width=16, settings=_pooled, extra=_with_pooled, layers=_FLUX_LAYERS,
    text_outputs=_FLUX_TEXT_OUTPUTS,
)  # fmt: skip

_FLUX2 = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
    "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
    "axes_dim": [4, 4, 4, 4], "theta": 2000, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3],
    "global_modulation": True, "mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0,
}  # fmt: skip

_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": 20, "n_layers": 4, "qk_norm": True,
    "n_refiner_layers": 1, "multiple_of": 16,
}  # fmt: skip
_LUMINA_LAYERS = frozenset({"attention.qkv", "attention.out", *(f"feed_forward.w{i}" for i in (1, 2, 3))})


def _flux2(name: str, guidance: bool) -> TinyFamily:
    return TinyFamily(
        name=name, family="flux2", build=partial(tiny_model, "Flux2", {**_FLUX2, "guidance_embed": guidance}),
        blocks=_numbered(double_blocks=2, single_blocks=3), latent_shape=(128, 3, 5), text_width=20, extra=_flux2_text,
        layers=_FLUX_LAYERS, text_outputs=_FLUX_TEXT_OUTPUTS, num_text=512,
    )  # fmt: skip


def _wan(name: str, supported: str, channels: int) -> TinyFamily:
    config = {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": 24, "ffn_dim": 40, "num_heads": 2,
        "num_layers": 4, "in_dim": channels, "out_dim": channels, "freq_dim": 16, "text_dim": 20, "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6,
    }  # fmt: skip
    return TinyFamily(
        name=name, family="wan", build=partial(tiny_model, supported, config), blocks=_numbered(blocks=4),
        latent_shape=(channels, 6, 10), text_width=20, frames=True, num_text=0,
        layers=frozenset({"ffn.0", "ffn.2", *(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo")}),
    )  # fmt: skip


FAMILIES: tuple[TinyFamily, ...] = (
    FLUX,
    _flux2("flux2", guidance=True),
    _flux2("klein", guidance=False),
    TinyFamily(
        name="qwen_image", family="qwen_image", frames=True,
        build=partial(tiny_model, "QwenImage", {
            "image_model": "qwen_image", "in_channels": 64, "num_layers": 4, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
        }),
        blocks=_numbered(transformer_blocks=4), latent_shape=(16, 6, 10), text_width=20,
        layers=frozenset({
            *(f"attn.to_{x}" for x in ("q", "k", "v", "out.0", "add_out")), *(f"attn.add_{x}_proj" for x in "qkv"),
            *(f"{s}_mlp.net.{x}" for s in ("img", "txt") for x in ("0.proj", "2")),
        }),
        text_outputs=frozenset({"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}),
    ),
    TinyFamily(
        name="z_image", family="lumina2", num_text=32, num_img=32,
        build=partial(tiny_model, "ZImage", {
            **_LUMINA, "dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "rope_theta": 256.0,
            "ffn_dim_multiplier": 0.5, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        }),
        blocks=_numbered(layers=4), latent_shape=(16, 6, 10), text_width=20, extra=_lumina_text, layers=_LUMINA_LAYERS,
    ),
    TinyFamily(
        name="lumina2", family="lumina2",
        build=partial(tiny_model, "Lumina2", {
            **_LUMINA, "dim": 48, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [4, 4, 4], "rope_theta": 10000.0,
            "ffn_dim_multiplier": 2.0,
        }),
        blocks=_numbered(layers=4), latent_shape=(16, 6, 10), text_width=20, extra=_lumina_text, layers=_LUMINA_LAYERS,
    ),
    _wan("wan21", "WAN21_T2V", 16),
    _wan("wan22", "WAN22_T2V", 48),
    TinyFamily(
        name="chroma", family="chroma",
        build=partial(tiny_model, "Chroma", {
            "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": 20,
            "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
            "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "in_dim": 64, "out_dim": 32, "hidden_dim": 48,
            "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": None,
        }),
        blocks=_numbered(double_blocks=2, single_blocks=3), latent_shape=(16, 6, 10), text_width=20, extra=_chroma_text,
        layers=_FLUX_LAYERS, text_outputs=_FLUX_TEXT_OUTPUTS,
    ),
    TinyFamily(
        name="sd35", family="sd3",
        build=partial(tiny_model, "SD3", {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 4, "input_size": None,
            "adm_in_channels": 16, "num_patches": 144, "pos_embed_max_size": 12, "pos_embed_scaling_factor": None,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 64}
            },
            "qk_norm": "rms", "x_block_self_attn_layers": [0, 1],
        }),
        blocks=_numbered(joint_blocks=4), latent_shape=(16, 6, 10), text_width=20, settings=_pooled, extra=_with_pooled,
        layers=frozenset({
            *(f"{s}_block.{x}" for s in ("context", "x") for x in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
            "x_block.attn2.qkv", "x_block.attn2.proj",
        }),
        text_outputs=frozenset({"context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2"}),
    ),
)  # fmt: skip

# --- in any format -----------------------------------------------------------------------------------------------

_FLUX_16 = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": 16,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 4, "axes_dim": [16, 8, 8],
    "theta": 10000, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
_WIDER: dict[str, dict[str, Any]] = {
    "wan21": {"dim": 32, "ffn_dim": 64}, "wan22": {"dim": 32, "ffn_dim": 64}, "lumina2": {"dim": 64, "axes_dims": [8, 4, 4]},
}  # fmt: skip


def _wide(tiny: TinyFamily) -> TinyFamily:
    if tiny is FLUX:
        return replace(tiny, build=partial(tiny_model, "FluxSchnell", _FLUX_16), latent_shape=(16, 6, 10))
    supported, config = tiny.build.args
    return replace(tiny, build=partial(tiny_model, supported, {**config, **_WIDER.get(tiny.name, {})}))


WIDE: tuple[TinyFamily, ...] = tuple(map(_wide, FAMILIES))
"""The same, built with any layers (``operations``), whose widths are multiples of the 32 numbers that share a scale."""

"""Operations of the sampling stages, counted on published models at full size, without weights and without a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from blockskip_pack.blockskip_core.accounting.fused_kernels import FusedAttention
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.hosts.families.published_sizes import PUBLISHED_SIZES
from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit
from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS

SIDE = 64  # fine tokens per side at 1024 px
PATCH, CHANNELS = 2, 16  # of FLUX.1 and SD3.5
T5_SIZE = {
    "num_layers": 24, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True, "model_type": "t5", "vocab_size": 32128,
}  # fmt: skip
VAE_SIZE = {
    "ch": 128, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attn_resolutions": [], "in_channels": 3,
    "resolution": 256, "z_channels": CHANNELS,
}  # fmt: skip


class ByKind(Counting):
    """Counts attention's own two products separately."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = self.operations
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if "scaled_dot_product" in str(func):
            self.attention += self.operations - before
        return result


@dataclass(frozen=True)
class Operations:
    """Operations of one forward.

    Attributes:
        products: Multiplications and additions of all matrix products and convolutions except attention's own.
        attention: Those of queries with keys, and of weights with values.
    """

    products: int
    attention: int

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.attention + other.attention)

    def __rmul__(self, times: int) -> Operations:
        return Operations(times * self.products, times * self.attention)

    @property
    def total(self) -> int:
        return self.products + self.attention


@lru_cache
def forward(name: str, image_tokens: int, text_tokens: int) -> Operations:
    """Count a published model's forward on a strip of tokens, as in the sampler's second stage."""
    pooled = PUBLISHED_SIZES[name].config.get("vec_in_dim") or PUBLISHED_SIZES[name].config.get("adm_in_channels")
    caption = [[torch.zeros(1, text_tokens, 4096), {"pooled_output": torch.zeros(1, pooled), "guidance": 3.5}]]
    dit = WeightlessDit.published(name, caption, (CHANNELS, 2 * PATCH, 2 * PATCH))
    if "SD3" in name:  # its table of positions is only as long as a picture; the sampler reads other rows
        dit.model.diffusion_model.cropped_pos_embed = lambda hw, device=None: torch.empty(
            1, image_tokens, dit.width, device=device
        )
    noisy = torch.empty(1, CHANNELS, PATCH, image_tokens * PATCH, device="meta")
    with torch.no_grad(), dit.running({}) as denoise, ByKind() as counting:
        denoise(noisy, torch.empty(1, device="meta"), [0])
    return Operations(counting.operations - counting.attention, counting.attention)


def text_encoder(text_tokens: int) -> Operations:
    """Count T5-XXL's encoder."""
    import comfy.ops
    from comfy.text_encoders.t5 import T5

    device = torch.device("meta")
    encoder = T5(T5_SIZE, torch.bfloat16, device, comfy.ops.disable_weight_init)
    tokens = torch.empty(1, text_tokens, 4096, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), FusedAttention(), ByKind() as counting:
        encoder(None, None, embeds=tokens)
    return Operations(counting.operations - counting.attention, counting.attention)


def decoder(side: int) -> Operations:
    """Count FLUX.1's VAE decoder for a latent with ``side`` cells per side."""
    from comfy.ldm.modules.diffusionmodules.model import Decoder, pytorch_attention

    with torch.device("meta"):
        built = Decoder(**VAE_SIZE)
        latent = torch.empty(1, CHANNELS, side, side)
    built.mid.attn_1.optimized_attention = pytorch_attention  # the host's own function queries the device's free memory
    with torch.no_grad(), FusedAttention(), ByKind() as counting:
        built(latent)
    return Operations(counting.operations - counting.attention, counting.attention)


def tokens_of_stages(ratio: float) -> tuple[int, int, int]:
    """Return image tokens per stage at 1024 px; regions are a share of the coarse tokens, rounded down."""
    coarse = (SIDE // 2) ** 2
    return coarse, coarse + 3 * int(coarse * ratio), SIDE**2


def plain(name: str, steps: int, text_tokens: int) -> Operations:
    """Count sampling at full resolution."""
    return steps * forward(name, SIDE**2, text_tokens)


def staged(name: str, preset: str, ratio: float, text_tokens: int) -> Operations:
    """Count the three stages."""
    stages = zip(PRESETS[preset].steps, tokens_of_stages(ratio), strict=True)
    first, second, third = (steps * forward(name, tokens, text_tokens) for steps, tokens in stages)
    return first + second + third


ARMS = (  # name, preset, share of early regions
    ("FLUX 4x", 0.3), ("FLUX 5x", 0.2), ("FLUX 7x", 0.2), ("FLUX 7x", 0.1),
)  # fmt: skip
SD3_ARMS = (("SD3 2x", 0.3), ("SD3 3x", 0.2))


def rows() -> list[dict[str, Any]]:
    """Return all counts."""
    found = []
    for text_tokens in (256, 512):
        found.append(_row("FLUX.1-dev", "plain", 50, None, text_tokens, plain("FLUX.1-dev", 50, text_tokens)))
        for preset, ratio in ARMS:
            steps = sum(PRESETS[preset].steps)
            count = staged("FLUX.1-dev", preset, ratio, text_tokens)
            found.append(_row("FLUX.1-dev", preset, steps, ratio, text_tokens, count))
        found.append(_row("T5-XXL", "once", 1, None, text_tokens, text_encoder(text_tokens)))
    found.append(_row("VAE decoder", "1024 px", 1, None, 0, decoder(128)))
    found.append(_row("VAE decoder", "512 px", 1, None, 0, decoder(64)))
    found.append(_row("SD3.5-Large", "plain", 28, None, 333, plain("SD3.5-Large", 28, 333)))
    for preset, ratio in SD3_ARMS:
        count = staged("SD3.5-Large", preset, ratio, 333)
        found.append(_row("SD3.5-Large", preset, sum(PRESETS[preset].steps), ratio, 333, count))
    return found


def _row(model: str, what: str, steps: int, ratio: float | None, text_tokens: int, count: Operations) -> dict[str, Any]:
    return {
        "model": model, "what": what, "steps": steps, "ratio": ratio, "text_tokens": text_tokens, **asdict(count),
    }  # fmt: skip

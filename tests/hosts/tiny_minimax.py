"""A tiny MiniMax H3 of ComfyUI's own class; it has a file, but not in ``FAMILIES``: it takes one example at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .tiny_families import TinyFamily, tiny_model

SMALL = {
    "image_model": "minimax_h3", "hidden_size": 32, "num_layers": 4, "token_refiner_num_layers": 1,
    "num_attention_heads": 2, "attention_head_dim": 16, "ffn_hidden_size": 48, "text_dim": 20, "timestep_input_dim": 16,
    "time_embed_hidden_size": 24, "time_embed_dim": 24, "rope_inv_freq_len": 2,
}  # fmt: skip
CURVES = {
    **{name: n for name, n in SMALL.items() if not name.startswith("time")},
    "adaln_curve_grid": 9,
    "time_embed_dim": 4,
}
"""The form of the files that ComfyUI's templates load: a table of modulations in the place of layers."""
MINIMAX = TinyFamily(
    name="minimax", family="minimax", build=partial(tiny_model, "MiniMaxH3", SMALL),
    blocks=tuple(f"blocks.{index}" for index in range(4)), latent_shape=(24, 6, 10), text_width=20,
    layers=frozenset({"attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2"}), frames=True,
)  # fmt: skip
MINIMAX_CURVES = replace(MINIMAX, name="curves", build=partial(tiny_model, "MiniMaxH3", CURVES))

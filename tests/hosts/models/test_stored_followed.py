"""LTX-2, which is followed, and MiniMax H3 in the formats in which models are shipped, through ComfyUI's own loader."""

from __future__ import annotations

import json

import pytest
import torch
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ...core.plain_dit import MemorySource, lora_for, train
from ..followed_families import family
from ..stored_flux import known_format, load, write
from ..tiny_families import PLAN, replayed, selection
from ..tiny_minimax import MINIMAX

pytestmark = pytest.mark.usefixtures("comfyui")
LTX_2 = {
    "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 128, "audio_cross_attention_dim": 64,
    "attention_head_dim": 64, "audio_attention_head_dim": 32, "num_attention_heads": 2, "audio_num_attention_heads": 2,
    "caption_channels": 20, "num_layers": 3, "connector_attention_head_dim": 64, "connector_num_attention_heads": 2,
    "connector_num_layers": 1, "audio_connector_attention_head_dim": 32, "audio_connector_num_attention_heads": 2,
    "caption_proj_before_connector": True, "cross_attention_adaln": True,
}  # fmt: skip
MINIMAX_H3 = {
    "num_layers": 3, "token_refiner_num_layers": 1, "hidden_size": 128, "attention_head_dim": 64, "num_attention_heads": 2,
    "ffn_hidden_size": 128, "text_dim": 20, "adaln_curve_grid": 9, "time_embed_dim": 4, "rope_inv_freq_len": 8,
}  # fmt: skip
CASES = {"ltx2": ("LTXAV", "ltxav", LTX_2, family("ltx2")), "minimax": ("MiniMaxH3", "minimax_h3", MINIMAX_H3, MINIMAX)}
SHIPPED = ("bf16", "fp8 scaled", "int8 convrot", "nvfp4")


def tensors(case):
    """Random weights, by name in the file."""
    from ..tiny_families import tiny_model

    supported, image_model, config, _ = CASES[case]
    model = tiny_model(supported, {"image_model": image_model, **config}).model.diffusion_model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stored(folder, name, case, state):
    known = known_format(name)
    path = folder / f"{name.replace(' ', '_')}.safetensors"
    write(path, known, state, {"config": json.dumps({"transformer": LTX_2})} if case == "ltx2" else {})
    return load(path, known)


def gradients(patcher, case, spans):
    tiny = CASES[case][-1]
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    adapters = lora_for(
        dit, spans, wanted=dit.lora_layers(spans, "attention and mlp").__contains__, dtype=torch.float32, zero=False,
        size=0.05,
    )  # fmt: skip
    source = MemorySource(dit, spans, PLAN, clean, [0])
    result, found = train(dit, spans, source, adapters, plan=PLAN, clean=clean, learning_rate=1e-12)
    return result, found


def dequantised(patcher, state):
    """The file's weights as they are used, in float32."""
    own = dict(patcher.model.diffusion_model.named_parameters())
    plain = {}
    for name, tensor in state.items():
        value = own.get(name, tensor)
        value = value.dequantize() if hasattr(value, "_qdata") else value
        plain[name] = value.detach().float().clone()
    return plain


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # comfy_kitchen normalises in float32
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SHIPPED)
def test_skipping_is_the_whole_model_and_a_step_trains(tmp_path, name, case):
    tiny = CASES[case][-1]
    patcher = stored(tmp_path, name, case, tensors(case))
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    spans = selection(1, 1, len(dit.blocks))
    computed = precompute_residuals(dit, PLAN, clean, spans, [0])
    got, whole = replayed(dit, spans, computed.residuals, clean, [0]), computed.reference.denoised
    half = next(patcher.model.diffusion_model.parameters()).dtype in (torch.bfloat16, torch.float16)
    assert (got - whole).norm() <= (2e-2 if half else 1e-4) * (whole - clean[:1]).norm()
    _, found = gradients(patcher, case, spans)
    assert found
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_written_out_weights(tmp_path, case):
    state = tensors(case)
    patcher = stored(tmp_path, "fp8 scaled", case, state)
    spans = selection(1, 1, CASES[case][2]["num_layers"])
    twin = stored(tmp_path, "fp32", case, dequantised(patcher, state))
    _, found = gradients(patcher, case, spans)
    _, expected = gradients(twin, case, spans)
    for layer, gradient in found.items():
        difference = (gradient - expected[layer]).norm() / expected[layer].norm()
        assert difference < 1e-3, layer

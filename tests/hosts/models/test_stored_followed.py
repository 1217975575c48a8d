"""Models without a file of their own in the formats in which they are shipped: LTX-2, loaded by ComfyUI's own loader."""

from __future__ import annotations

import json

import pytest
import torch
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ...core.plain_dit import MemorySource, lora_for, train
from ..followed_families import family
from ..stored_flux import known_format, load, write
from ..tiny_families import PLAN, replayed, selection

pytestmark = pytest.mark.usefixtures("comfyui")
CONFIG = {
    "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 128, "audio_cross_attention_dim": 64,
    "attention_head_dim": 64, "audio_attention_head_dim": 32, "num_attention_heads": 2, "audio_num_attention_heads": 2,
    "caption_channels": 20, "num_layers": 3, "connector_attention_head_dim": 64, "connector_num_attention_heads": 2,
    "connector_num_layers": 1, "audio_connector_attention_head_dim": 32, "audio_connector_num_attention_heads": 2,
    "caption_proj_before_connector": True, "cross_attention_adaln": True,
}  # fmt: skip
TINY = family("ltx2")
SHIPPED = ("bf16", "fp8 scaled", "int8 convrot", "nvfp4")


def tensors():
    """Random weights, by name in the file."""
    from ..tiny_families import tiny_model

    model = tiny_model("LTXAV", {"image_model": "ltxav", **CONFIG}).model.diffusion_model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stored(folder, name, state):
    known = known_format(name)
    path = folder / f"{name.replace(' ', '_')}.safetensors"
    write(path, known, state, {"config": json.dumps({"transformer": CONFIG})})
    return load(path, known)


def gradients(patcher, spans):
    dit, clean = TINY.hosted(patcher), TINY.clean_latents()
    adapters = lora_for(
        dit, spans, wanted=dit.lora_layers(spans, "attention and mlp").__contains__, dtype=torch.float32, zero=False,
        size=0.05,
    )  # fmt: skip
    source = MemorySource(dit, spans, PLAN, clean)
    result, found = train(dit, spans, source, adapters, plan=PLAN, clean=clean, batch_size=2, learning_rate=1e-12)
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


@pytest.mark.parametrize("name", SHIPPED)
def test_skipping_is_the_whole_model_and_a_step_trains(tmp_path, name):
    patcher = stored(tmp_path, name, tensors())
    dit, clean = TINY.hosted(patcher), TINY.clean_latents()
    spans = selection(1, 1, len(dit.blocks))
    computed = precompute_residuals(dit, PLAN, clean, spans, [0])
    got, whole = replayed(dit, spans, computed.residuals, clean, [0]), computed.reference.denoised
    half = next(patcher.model.diffusion_model.parameters()).dtype in (torch.bfloat16, torch.float16)
    assert (got - whole).norm() <= (2e-2 if half else 1e-4) * (whole - clean[:1]).norm()
    _, found = gradients(patcher, spans)
    assert found
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("name", ["fp8 scaled"])
def test_gradients_are_those_of_the_written_out_weights(tmp_path, name):
    state = tensors()
    patcher = stored(tmp_path, name, state)
    spans = selection(1, 1, CONFIG["num_layers"])
    twin = stored(tmp_path, "fp32", dequantised(patcher, state))
    _, found = gradients(patcher, spans)
    _, expected = gradients(twin, spans)
    for layer, gradient in found.items():
        difference = (gradient - expected[layer]).norm() / expected[layer].norm()
        assert difference < 1e-3, layer

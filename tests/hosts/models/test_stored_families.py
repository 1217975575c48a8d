"""Every class of model with blocks in the formats in which models are shipped, in the layers that ComfyUI's loader chooses."""

from __future__ import annotations

import json
from itertools import cycle

import pytest
import torch
from blockskip_pack.blockskip_core.hosts.families.block_lists import block_lists
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from torch import nn

from ...core.plain_dit import MemorySource, train
from ..followed_families import FOLLOWED
from ..tiny_families import PLAN, WIDE, replayed, selection

pytestmark = pytest.mark.usefixtures("comfyui")
EMULATED = {"float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4"}  # by ComfyUI on a CPU
GROUP = 16  # of ConvRot, small enough for tiny models
TRAINED = (*WIDE, *FOLLOWED)
WITHOUT_INT8 = {"hidream": "yes, but its experts"}  # comfy_kitchen's int8 on a CPU fails without any rows


def in_three_formats(tiny):
    """A MODEL whose blocks' matrices are in fp8, int8 with ConvRot and NVFP4 by turns, and the same written out in float32.

    ComfyUI does not tell so small a model's class from its file, so it is given.
    """
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    plain = tiny.build()
    model = plain.model.diffusion_model
    lists = tuple(f"{name}." for name in block_lists(model))
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if name.startswith(lists)
        and isinstance(layer, nn.Linear)
        and not (layer.in_features % GROUP or layer.out_features % GROUP)
    }
    turns = cycle((
        ("float8_e4m3fn", {"scale": "recalculate"}, {}),
        ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": GROUP},
         {"convrot": True, "convrot_groupsize": GROUP}),
        ("nvfp4", {}, {}),
    ))  # fmt: skip
    stored, written_out = {}, {}
    for name, tensor in model.state_dict().items():
        written_out[name] = stored[name] = tensor.clone()
        if name not in linear:
            continue
        algorithm, options, conf = next(turns)
        if algorithm.startswith("int8") and tiny.name in WITHOUT_INT8 and ".experts." in name:
            continue
        packed = QuantizedTensor.from_float(tensor.clone(), QUANT_ALGOS[algorithm]["comfy_tensor_layout"], **options)
        stored.update({key: part.clone() for key, part in packed.state_dict(name).items()})
        told = json.dumps({"format": algorithm, **conf}).encode()
        stored[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
        written_out[name] = packed.dequantize()
    with torch.inference_mode():
        patcher = tiny.build(
            operations=comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, disabled=EMULATED)
        )
        patcher.model.load_model_weights(stored)
        model.load_state_dict(written_out)
    return patcher, plain


def in_fp8(tiny):
    """A MODEL as Load Diffusion Model makes it with an fp8 ``weight_dtype``, norms and biases too, and its float32 twin."""
    patcher, plain = tiny.build(dtype=torch.float8_e4m3fn, cast_to=torch.float32), tiny.build()
    written_out = {name: tensor.float() for name, tensor in patcher.model.diffusion_model.state_dict().items()}
    with torch.inference_mode():
        plain.model.diffusion_model.load_state_dict(written_out)
    return patcher, plain


def formats_of(block):
    return {getattr(layer, "quant_format", None) for layer in block.modules()}


def gradients(tiny, patcher, spans):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    source = MemorySource(dit, spans, PLAN, clean, [0])
    _, found = train(dit, spans, source, tiny.lora(dit, spans, zero=False), plan=PLAN, clean=clean, learning_rate=1e-12)
    return torch.cat([gradient.flatten() for gradient in found.values()])


@pytest.mark.parametrize(
    ("tiny", "made", "bound"),
    [
        *(pytest.param(tiny, in_three_formats, 0.05, id=f"{tiny.name}-three") for tiny in TRAINED),
        *(pytest.param(tiny, in_fp8, 1e-3, id=f"{tiny.name}-fp8") for tiny in WIDE),
    ],
)
def test_every_class_is_trained_from_quantised_weights(tiny, made, bound):
    """Of the three formats only int8 rounds what enters a layer too, so its gradients are only near."""
    patcher, twin = made(tiny)
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    count = len(dit.blocks)
    kept = dit.module(dit.blocks[1].name)
    if made is in_three_formats:
        assert formats_of(kept) >= {"float8_e4m3fn", "int8_tensorwise", "nvfp4"}
    else:
        assert {parameter.dtype for parameter in kept.parameters()} == {torch.float8_e4m3fn}
    spans = selection(1, count - 3, count)
    computed = precompute_residuals(dit, PLAN, clean, spans, [0])
    whole = computed.reference.denoised
    torch.testing.assert_close(replayed(dit, spans, computed.residuals, clean, [0]), whole, atol=1e-3, rtol=1e-3)
    found, expected = gradients(tiny, patcher, spans), gradients(tiny, twin, spans)
    assert found.isfinite().all()
    assert found.any()
    assert (found - expected).norm() <= bound * expected.norm(), (found - expected).norm() / expected.norm()

"""Every class of model from GGUF files through the real ComfyUI-GGUF."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ...core.plain_dit import MemorySource, train
from ..followed_families import FOLLOWED
from ..gguf_files import plain_weights, stored
from ..tiny_families import PLAN, WIDE, TinyFamily, replayed, selection

pytestmark = pytest.mark.usefixtures("comfyui")
TRAINED = (*WIDE, *FOLLOWED)


def gradients(tiny: TinyFamily, patcher, spans):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    adapters = tiny.lora(dit, spans, zero=False)
    source = MemorySource(dit, spans, PLAN, clean)
    result, found = train(dit, spans, source, adapters, plan=PLAN, clean=clean, learning_rate=1e-12)
    return result.losses, found


@pytest.mark.parametrize("tiny", TRAINED, ids=lambda tiny: tiny.name)
def test_a_model_is_trained_from_its_packed_weights(tmp_path, tiny):
    patcher = stored(tiny, tmp_path / "model.gguf")
    before = {
        name: parameter.data.as_subclass(torch.Tensor).clone() for name, parameter in patcher.model.named_parameters()
    }
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    count = len(dit.blocks)
    packed = [p for p in dit.module(dit.blocks[1].name).parameters() if getattr(p, "tensor_type", 0) not in (0, 1)]
    assert packed

    spans = selection(1, count - 3, count)
    computed = precompute_residuals(dit, PLAN, clean, spans, [0])
    whole = computed.reference.denoised
    torch.testing.assert_close(replayed(dit, spans, computed.residuals, clean, [0]), whole, atol=1e-5, rtol=0.0)

    twin = tiny.build()
    with torch.inference_mode():
        twin.model.diffusion_model.load_state_dict(plain_weights(patcher), strict=False)
    losses, found = gradients(tiny, patcher, spans)
    expected_losses, expected = gradients(tiny, twin, spans)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for key, gradient in expected.items():
        assert gradient.any() or ".experts." in key
        assert (found[key] - gradient).norm() <= 2e-3 * gradient.norm(), key
    after = {name: parameter.data.as_subclass(torch.Tensor) for name, parameter in patcher.model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], raw) for name, raw in before.items())

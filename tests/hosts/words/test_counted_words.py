"""Counts of a step without weights equal those of a real step."""

import pytest
import torch
from blockskip_pack.blockskip_core.accounting.measuring import Counting
from blockskip_pack.blockskip_core.accounting.weight_formats import stored_bytes

from ..tiny_flux import assert_same_weights, weights
from .test_losses import EXAMPLE, Bench

CPU = torch.device("cpu")
SMALL = 70_000  # bytes of words, latents and noise, which the real step on the CPU has on the same device


@pytest.mark.parametrize("family", ["SD1.5", "FLUX.1"])
@torch.no_grad()
def test_it_is_what_a_real_step_takes(comfyui, clip_of, model_of, family):
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import torch_attention
    from blockskip_pack.blockskip_core.hosts.words.counted_words import word_needs

    model = model_of(family)
    model.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
    bench = Bench(clip_of(family), model)
    before = weights(model), weights(bench.clip.patcher), dict(vars(bench.captions.clip))
    needs = word_needs(model, bench.captions, bench.layout, bench.latents.shape[1:], 4)
    with bench.losses.loaded(4), Counting() as counting:
        conditionings = bench.losses._encoded(bench.words(), 1)
        assert 0 <= counting.peak(CPU) - needs.text_peak < SMALL
        counting.reset_peak()
        bench.losses._evaluated(conditionings, EXAMPLE)
        assert 0 <= counting.peak(CPU) - needs.model_peak < SMALL
    assert needs.model_weights == sum(stored_bytes(tensor) for tensor in model.model.state_dict().values())
    assert needs.together == needs.text_weights + needs.model_weights + max(needs.text_peak, needs.model_peak)
    assert needs.in_turns == max(needs.text_weights + needs.text_peak, needs.model_weights + needs.model_peak)
    assert_same_weights(model, before[0])
    assert_same_weights(bench.clip.patcher, before[1])
    assert dict(vars(bench.captions.clip)) == before[2]

"""Reference pictures of edit models, on tiny models of ComfyUI's own classes."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.blocks.replay import Residual
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals
from blockskip_pack.blockskip_core.residuals.sources import FoldedSource

from ..edit_models import SIDES, edit_model
from ..sampling import test_training_samples
from ..tiny_families import PLAN, replayed
from . import test_families

pytestmark = pytest.mark.usefixtures("comfyui")

CASES = [("flux", None), ("flux2", None), ("klein", "index_timestep_zero"), ("qwen_image", "index_timestep_zero")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)), scope="module")
def tiny(request):
    return edit_model(*request.param)


@pytest.fixture(scope="module")
def patcher(comfyui, tiny):
    return tiny.build()


def test_front_middle_and_back_together_are_the_full_model(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    full = tiny.full_forward(dit, clean, [0])
    last = tiny.num_blocks - 1
    for front, back, tail in ((1, 0, 0), (last, 0, 0), (0, last, 0), (1, 2, 0), (0, 1, 2), (1, 1, 1)):
        spans = tiny.chosen(front, back, tail)
        computed = precompute_residuals(dit, PLAN, clean, spans, [0])
        skipping = replayed(dit, spans, computed.residuals, clean, [0])
        assert skipping.shape == clean[:1].shape
        torch.testing.assert_close(skipping, full, atol=1e-5 if back else 0.0, rtol=0.0, msg=f"{front}, {back}, {tail}")
        assert torch.equal(computed.reference.denoised, full)


def test_the_references_change_the_output(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    full = tiny.full_forward(dit, clean, [0])
    other = tiny.hosted(patcher)
    other._captions = tiny.captions(tiny.lengths)
    other._captions[0][0][1]["reference_latents"][1] += 1.0
    assert not torch.allclose(tiny.full_forward(other, clean, [0]), full, atol=1e-3)


def test_what_is_stored_covers_the_picture_and_only_where_it_is_read_the_references(tiny, patcher):
    dit, clean = tiny.hosted(patcher), tiny.clean_latents()
    at_the_end = precompute_residuals(dit, PLAN, clean, tiny.chosen(1, 1), [1]).residuals[1]
    assert dit.text_tokens(2) == tiny.num_text
    assert at_the_end.front.img.shape == at_the_end.back.shape == (1, tiny.num_img, dit.width)
    assert at_the_end.front.txt.shape == (1, tiny.num_text, dit.width)
    assert at_the_end.back_txt is None
    before_others = precompute_residuals(dit, PLAN, clean, tiny.chosen(0, 1, 1), [1]).residuals[1]
    assert before_others.back_txt.shape == (1, tiny.num_text, dit.width)
    without = {1: Residual(before_others.front, before_others.back)}
    full = tiny.full_forward(dit, clean, [1])
    assert not torch.allclose(replayed(dit, tiny.chosen(0, 1, 1), without, clean, [1]), full, atol=1e-3)


def test_the_folded_form_gives_the_gradients_of_the_cached_one_while_the_lora_is_zero(tiny, patcher):
    spans = tiny.chosen(1, 1, 1)
    cached = tiny.run(patcher, spans, batch_size=2)
    folded = tiny.run(patcher, spans, batch_size=2, source=FoldedSource())
    assert folded[0].losses == pytest.approx(cached[0].losses, rel=1e-5)
    for key, gradient in cached[1].items():
        assert (folded[1][key] - gradient).norm() <= 1e-4 * gradient.norm()


def test_checkpointing_gives_the_same_gradients_to_the_last_bit(tiny, patcher):
    spans = tiny.chosen(1, 1, 1)
    dit = tiny.hosted(patcher)
    plain, other = (
        tiny.run(patcher, spans, adapters=tiny.lora(dit, spans, zero=False), batch_size=2, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert plain[0].losses == other[0].losses
    assert all(torch.equal(other[1][key], gradient) for key, gradient in plain[1].items())


def test_training_lowers_the_loss_of_the_picture_alone(tiny, patcher):
    spans = tiny.chosen(1, 1)
    result, gradients, _ = tiny.run(patcher, spans, steps=9, batch_size=2, learning_rate=1e-2)
    assert result.losses[-1] < 0.98 * result.losses[0]
    assert result.self_check < 1e-5
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_gradients_are_those_of_finite_differences(name):
    tiny = edit_model(name)
    test_families.test_gradients_are_those_of_finite_differences(tiny, None, (1, 1))


def test_a_hidden_text_reaches_the_picture_by_no_reference_either(tiny, patcher):
    test_families.test_masking_all_blocks_makes_the_output_independent_of_the_words(tiny, patcher)
    test_families.test_masking_nothing_is_the_plain_model(tiny, patcher)


def test_samples_while_training_see_the_references_of_their_prompts(tiny):
    from blockskip_pack.blockskip_core.hosts.sampling import training_samples

    test_training_samples.test_every_family_is_sampled_as_by_the_host(training_samples, tiny, 3.0)


def test_a_run_is_counted_with_its_references(tiny, patcher):
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    dit = tiny.hosted(patcher)
    twin = WeightlessDit.of(dit)
    assert [twin.text_tokens(caption) for caption in range(3)] == [dit.text_tokens(caption) for caption in range(3)]
    with torch.no_grad(), twin.running({}) as denoise:
        output = denoise(torch.empty(1, *tiny.latent_shape, device="meta"), torch.empty(1, device="meta"), [0])
    assert output.shape == (1, *tiny.latent_shape)


def test_rows_are_batched_if_their_texts_and_references_have_equal_shapes(tiny, patcher):
    dit = tiny.hosted(patcher, (5, 5, 3))
    turned = edit_model(tiny.name.removesuffix("_edit"), None, SIDES[::-1]).captions((5,))
    bare = [[[turned[0][0][0], {**turned[0][0][1], "reference_latents": []}]]]
    keys = [dit.batch_key(caption) for caption in range(3)]
    keys += [tiny.hosted(patcher, (5,)).batch_key(0)]
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    keys += [HostedDit(patcher, other, tiny.latent_shape).batch_key(0) for other in (turned, bare)]
    if tiny.family == "flux2":  # ComfyUI fills texts up to one length
        keys = [key[1:] for key in keys]
        assert keys[0] == keys[1] == keys[2] == keys[3]
    else:
        assert keys[0] == keys[1] == keys[3] != keys[2]
    assert len({keys[0], keys[4], keys[5]}) == 3

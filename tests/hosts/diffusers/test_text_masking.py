"""Text hidden from blocks: nothing changes where none is masked, and where all are, the text does not matter."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.data.flow_matching import noisy_batch
from blockskip_pack.blockskip_core.errors import UnsupportedModelError
from blockskip_pack.blockskip_core.hosts import diffusers as host
from blockskip_pack.blockskip_core.selection.text_influence import TextInfluence, measure, measured_selection

from .tiny_models import FAMILIES, FLUX, FLUX2, PLAN, SANA, WAN, TinyModel


def two_texts(tiny):
    """Two captions that differ in their tokens only."""
    first = tiny.captions([5])[0]
    return [first, {**first, tiny.text_key: torch.flip(first[tiny.text_key], (1,)) * 2 + 1}]


@pytest.fixture(params=FAMILIES, ids=lambda tiny: tiny.name, scope="module")
def tiny(request) -> TinyModel:
    return request.param


@pytest.fixture(scope="module")
def dit(tiny):
    return host.DiffusersDit(tiny.build(), two_texts(tiny))


def estimates(tiny, dit, masked, captions=(0, 1)):
    noisy, _, sigmas = noisy_batch(PLAN, tiny.clean_latents(), [0])
    with torch.no_grad(), dit.running(host.masked_blocks(dit, masked)) as denoise:
        return [denoise(noisy, sigmas, [caption]) for caption in captions]


def test_with_no_block_masked_it_is_the_model_to_the_bit(tiny, dit):
    noisy, _, sigmas = noisy_batch(PLAN, tiny.clean_latents(), [0])
    with torch.no_grad(), dit.running({}) as denoise:
        whole = denoise(noisy, sigmas, [0])
    assert torch.equal(estimates(tiny, dit, [])[0], whole)
    assert not torch.equal(estimates(tiny, dit, [1])[0], whole)


def test_with_all_blocks_masked_the_text_does_not_matter(tiny, dit):
    first, second = estimates(tiny, dit, range(tiny.num_blocks))
    assert torch.equal(first, second)
    for one in range(tiny.num_blocks):
        first, second = estimates(tiny, dit, set(range(tiny.num_blocks)) - {one})
        assert not torch.equal(first, second), one


@pytest.mark.parametrize("tiny", [FLUX, FLUX2], ids=lambda tiny: tiny.name)
def test_a_masked_joint_attention_is_one_with_a_mask_written_by_hand(tiny):
    """Image queries get minus infinity at text keys; text queries see everything."""
    dit = host.DiffusersDit(tiny.build(), two_texts(tiny))
    seen = torch.ones(20, 20, dtype=torch.bool)  # five text tokens, then fifteen of the image
    seen[5:, :5] = False

    class Masked:
        config = dit.model.config

        def __call__(self, **arguments):
            return dit.model(**arguments, joint_attention_kwargs={"attention_mask": seen})

    noisy, _, sigmas = noisy_batch(PLAN, tiny.clean_latents(), [0])
    with torch.no_grad():
        velocity = tiny.plain(Masked(), noisy, sigmas, two_texts(tiny)[0])
    expected = noisy - sigmas.view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(estimates(tiny, dit, range(5))[0], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tiny", [SANA, WAN], ids=lambda tiny: tiny.name)
def test_a_masked_cross_attention_adds_the_bias_of_its_last_layer(tiny):
    model, masked = tiny.build(), [1, 2]
    dit = host.DiffusersDit(model, two_texts(tiny))
    ours = estimates(tiny, dit, masked)
    with torch.no_grad():
        for index in masked:
            dit.module(dit.blocks[index].name).attn2.to_out[0].weight.zero_()
    assert all(map(torch.equal, ours, estimates(tiny, dit, [])))


def test_the_model_is_left_as_it_was(tiny, dit):
    before = {name: tensor.clone() for name, tensor in dit.model.state_dict().items()}
    estimates(tiny, dit, [0, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dit.model.modules())


class ByHand:
    """An attention processor that does not use torch's attention function."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        own, text = attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)
        return attn.to_out[0](own), attn.to_add_out(text)


def test_an_attention_that_cannot_be_masked_is_refused():
    model = FLUX.build()
    for block in model.transformer_blocks:
        block.attn.set_processor(ByHand())
    dit = host.DiffusersDit(model, two_texts(FLUX))
    with pytest.raises(UnsupportedModelError, match="The text cannot be hidden .*set_attention_backend"):
        estimates(FLUX, dit, [0])


# --- choosing blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [SANA, FLUX], ids=lambda tiny: tiny.name)
def test_blocks_are_chosen_by_how_much_hiding_the_text_changes_the_pictures(tiny):
    dit = host.DiffusersDit(tiny.build(), tiny.captions())
    settings = host.ProbeSettings(rows=4, columns=4, num_steps=3, negative=2)
    probe, steps = host.ProbeLatents(dit, [0, 1], settings), []
    influence = measure(
        TextInfluence(tiny.num_blocks, num_pictures=2), probe, 2, progress=lambda *done: steps.append(done)
    )
    assert all(distance > 0 for distance in (influence.front[1], influence.back[1], influence.front[2]))
    assert steps[-1] == (len(steps), len(steps))
    chosen = measured_selection(influence, 2 / tiny.num_blocks, dit.family)
    sums = {n: influence.front[n] + influence.back[2 - n] for n in range(3)}
    assert (chosen.front, chosen.front + chosen.back) == (min(sums, key=sums.get), 2)


def test_probe_latents_are_eulers_method():
    """Without guidance and with it; the last step ends on the clean estimate."""
    dit = host.DiffusersDit(FLUX.build(), FLUX.captions())
    settings = {"rows": 4, "columns": 4, "num_steps": 2, "shift": 3.0, "seed": 7}
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), dit.running({}) as denoise:

        def velocity(latent, sigma, caption):
            sigmas = torch.tensor([sigma])
            return (latent - denoise(latent, sigmas, [caption])) / sigma

        for negative in (None, 1):
            latent = noise
            for sigma, following in ((1.0, 0.75), (0.75, 0.0)):
                direction = velocity(latent, sigma, 0)
                if negative is not None:
                    away = velocity(latent, sigma, negative)
                    direction = away + 2.0 * (direction - away)
                latent = latent + (following - sigma) * direction
            probe = host.ProbeLatents(dit, [0], host.ProbeSettings(**settings, negative=negative, guidance=2.0))
            (sampled,) = probe.embeddings(frozenset(), lambda: None)
            torch.testing.assert_close(sampled, latent, atol=1e-5, rtol=1e-5)

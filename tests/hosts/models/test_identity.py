"""Content hashes: equal models, pictures and captions have equal hashes, different ones have different hashes."""

import pytest
import torch

from ...core.plain_dit import MemorySource
from ..hosted_runs import PLAN, chosen, clean_latents, flux_lora, host_sample, hosted, run
from ..tiny_flux import captions, tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def identity(comfyui):
    from blockskip_pack.blockskip_core.hosts.models import identity

    return identity


def patched(patcher, strength=0.7, size=0.05):
    from blockskip_pack.blockskip_core.adapters.lora_formats import to_file_tensors
    from blockskip_pack.blockskip_core.hosts.files.applied_lora import apply_lora

    adapters = flux_lora(hosted(patcher), chosen(0, 0), zero=False, size=size)
    return apply_lora(patcher, to_file_tensors(adapters.state_dict(), adapters.scale, "peft"), strength)[0]


def test_the_same_weights_have_the_same_identity(identity):
    patcher = tiny_flux()
    first = identity.model_identity(patcher)
    assert first == identity.model_identity(tiny_flux()) == identity.model_identity(patcher.clone())
    assert first != identity.model_identity(tiny_flux(seed=1))
    assert first != identity.model_identity(tiny_flux(dtype=torch.bfloat16))


def test_loading_sampling_and_training_do_not_change_it(identity):
    patcher = tiny_flux()
    first = identity.model_identity(patcher)
    host_sample(patcher)
    assert identity.model_identity(patcher) == first
    run(patcher, chosen(1, 2), steps=2)
    assert identity.model_identity(patcher) == first


@pytest.mark.parametrize("name", ["img_in.weight", "double_blocks.1.img_attn.qkv.bias", "final_layer.linear.weight"])
def test_a_changed_weight_changes_it(identity, name):
    patcher = tiny_flux()
    first = identity.model_identity(patcher)
    with torch.inference_mode():
        patcher.model.diffusion_model.get_parameter(name).flatten()[0] += 0.01
    assert identity.model_identity(patcher) != first


def test_a_patch_and_its_strength_change_it_whether_loaded_or_not(identity):
    patcher = tiny_flux()
    first = identity.model_identity(patcher)
    half, whole, other = patched(patcher, 0.5), patched(patcher, 1.0), patched(patcher, 0.5, size=0.06)
    identities = {identity.model_identity(one) for one in (half, whole, other)}
    assert len(identities | {first}) == 4
    host_sample(half)  # merges the patch into the shared weights
    assert identity.model_identity(patcher) == first
    host_sample(half)
    assert identity.model_identity(half) in identities
    assert identity.model_identity(patched(patcher, 0.5)) == identity.model_identity(half)


def test_every_number_of_a_picture_counts(identity):
    picture = torch.rand(9, 200, 3)
    first = identity.tensors_identity([picture])
    assert identity.tensors_identity([picture.clone()]) == first
    for place in (0, 777, picture.numel() - 1):
        other = picture.clone()
        other.view(-1)[place] += 1e-6
        assert identity.tensors_identity([other]) != first
    assert identity.tensors_identity([picture, picture]) != first
    assert identity.tensors_identity([picture.view(200, 9, 3)]) != first


def test_every_part_of_a_conditioning_counts(identity):
    first = identity.conditionings_identity(captions((5, 3)))
    assert identity.conditionings_identity(captions((5, 3))) == first
    assert identity.conditionings_identity(captions((5, 3))[::-1]) != first
    assert identity.conditionings_identity(captions((5, 3), guidance=3.0)) != first
    changed = captions((5, 3))
    changed[1][0][1]["pooled_output"] = changed[1][0][1]["pooled_output"] + 1e-3
    assert identity.conditionings_identity(changed) != first
    reordered = captions((5, 3), guidance=3.0)
    reordered[0][0][1] = dict(reversed(reordered[0][0][1].items()))
    assert identity.conditionings_identity(reordered) == identity.conditionings_identity(captions((5, 3), guidance=3.0))


def test_captions_with_references_are_known_by_text_and_reference(identity):
    def carrying(first, second, guidance=2.0):
        text = captions((5,), guidance=guidance)[0][0]
        return [[[text[0], {**text[1], "reference_latents": [torch.full((1, 4, 2, 2), x)]}]] for x in (first, second)]

    first = identity.captions_identity(carrying(1.0, 2.0))
    assert identity.captions_identity(carrying(1.0, 2.0)) == first
    assert identity.captions_identity([[[x.clone(), dict(y)]] for [[x, y]] in carrying(1.0, 2.0)]) == first
    for other in (carrying(2.0, 1.0), carrying(1.0, 1.0), carrying(1.0, 2.0, guidance=3.0), carrying(1.0, 2.0)[:1]):
        assert identity.captions_identity(other) != first
    plain = captions((5, 3))
    assert identity.captions_identity(plain) == identity.conditionings_identity(plain)


def test_a_patched_model_has_residuals_of_its_own(identity):
    plain = tiny_flux()
    source = MemorySource(hosted(plain), chosen(1, 2), PLAN, clean_latents())
    other = MemorySource(hosted(patched(plain)), chosen(1, 2), PLAN, clean_latents())
    assert not torch.allclose(source.computed.residuals[0].back, other.computed.residuals[0].back, atol=1e-3)

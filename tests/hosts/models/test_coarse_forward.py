"""Coarse calls of every family's own forward, compared with FLUX.1 of larger patches and with hand-written forwards."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.coarse_noise import matched_noise
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError

from ..sampled_families import SAMPLED_ONLY
from ..tiny_families import FAMILIES, FLUX
from ..tiny_flux import assert_same_weights, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

SIGMA = 0.7
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def prepared(family):
    """A MODEL with what the family's positions need, its coarse calls, and the side of a token."""
    from blockskip_pack.blockskip_core.hosts.families.sampled_families import positions_of
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward

    patcher = family.build()
    coarse = CoarseForward(patcher)
    coarse.prepare(patcher)
    return patcher, coarse, positions_of(patcher)[1]


def latent(family, patch, batch=2, rows=4, columns=6):
    shape = (batch, family.latent_shape[0], rows * patch, columns * patch)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def estimate(family, patcher, coarse, x, adapter, lora=None):
    sigma = torch.full((len(x),), SIGMA)
    prompts = family.captions((5,)) * len(x)

    def denoise(noisy, level):
        return family.plain_forward(patcher, noisy, level, prompts)

    with torch.inference_mode():
        return coarse(denoise, x, sigma, adapter, lora or {}, {}).clone()


def moved(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += torch.randn(tensor.shape, generator=generator) * 0.05
    return adapter


@pytest.mark.parametrize("kind", ["nearest", "bilinear"])
def test_flux_is_flux_with_patches_of_twice_the_side_and_pseudo_inverse_weights(kind):
    """The reference is ComfyUI's own class built with patch_size 4, with FlexiViT's weights and stretched positions."""
    import comfy.ldm.flux.model
    import comfy.ops

    patcher, coarse, _ = prepared(FLUX)
    own, resizing = patcher.model.diffusion_model, PatchResizing(2, 2, kind)
    config = {**vars(own.params), "patch_size": 4}
    large = comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    state = dict(own.state_dict())
    channels = FLUX.latent_shape[0]
    embedding = state["img_in.weight"].reshape(64, channels, 2, 2)
    state["img_in.weight"] = resizing.embedding_weight(embedding).flatten(1)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        given = state[name].reshape(channels, 2, 2, -1).permute(3, 0, 1, 2)
        state[name] = resizing.enlarged(given).permute(1, 2, 3, 0).reshape(channels * 16, -1)
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"].flatten()
    large.load_state_dict(state)

    x, sigma = latent(FLUX, 2), torch.full((2,), SIGMA)
    ratio, level = matched_noise(sigma, resizing.noise_share)
    ((text, settings),) = FLUX.captions((5,))[0]
    stretched = {"rope_options": {"scale_x": 2.0, "scale_y": 2.0, "shift_x": 0.5, "shift_y": 0.5}}
    with torch.inference_mode():
        velocity = large(
            x * ratio[:, None, None, None], patcher.model.model_sampling.timestep(level), text.expand(2, -1, -1),
            settings["pooled_output"].expand(2, -1), transformer_options=stretched,
        )  # fmt: skip
    expected = resizing.carried(x) * ratio[:, None, None, None] - level[:, None, None, None] * velocity
    found = estimate(FLUX, patcher, coarse, x, CoarseAdapter(resizing))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_family
def test_tokens_are_placed_at_the_mean_of_their_members_on_every_family(family):
    """FLUX.1's rotations are compared with the host's own above; here every family gets the same places, and uses them."""
    patcher, coarse, patch = prepared(family)
    resizing, x, placed = PatchResizing(patch, 2), latent(family, patch), []
    places = type(coarse._positions).placed

    class Watched:
        def placed(self, where, options):
            placed.append(where)
            return places(coarse_positions, where, options)

    coarse_positions, coarse._positions = coarse._positions, Watched()
    found = estimate(family, patcher, coarse, x, CoarseAdapter(resizing))
    ratio, level = matched_noise(torch.full((2,), SIGMA), resizing.noise_share)
    reduced = resizing.reduced(x) * ratio[:, None, None, None]
    unplaced = resizing.enlarged(family.plain_forward(patcher, reduced, level, family.captions((5,)) * 2))
    assert placed[0].grid == (4, 6)
    assert placed[0].rows.tolist() == [[0.5] * 3 + [2.5] * 3]
    assert placed[0].columns.tolist() == [[0.5, 2.5, 4.5] * 2]
    assert found.isfinite().all()
    assert (found - unplaced).abs().max() > 1e-5  # tokens next to each other, not two apart


@each_family
def test_a_new_adapter_changes_nothing_and_a_moved_one_does_in_every_part(family):
    patcher, coarse, patch = prepared(family)
    resizing, x = PatchResizing(patch, 2), latent(family, patch)
    width = coarse_width(patcher)
    numbers = family.latent_shape[0] * resizing.side**2
    plain = estimate(family, patcher, coarse, x, CoarseAdapter(resizing))
    new = estimate(family, patcher, coarse, x, CoarseAdapter(resizing, None, PatchAdapter(numbers, width)))
    assert torch.equal(plain, new)
    for part in ("embedding", "identifier", "deembedding"):
        adapter = PatchAdapter(numbers, width)
        moved = getattr(adapter, part)
        with torch.no_grad():  # by other amounts in every feature: the mean of a token is lost in the first LayerNorm
            moved.add_(0.1 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1)))
        found = estimate(family, patcher, coarse, x, CoarseAdapter(resizing, None, adapter))
        assert (found - plain).abs().max() > 1e-4


def coarse_width(patcher):
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import shape_of

    return shape_of(patcher, "").width


@each_family
def test_the_de_embedding_sees_the_tokens_of_the_image_in_order(family):
    """The tokens that enter it, sent through the model's own de-embedding, are the model's output."""
    patcher, coarse, patch = prepared(family)
    resizing, x = PatchResizing(patch, 2), latent(family, patch, batch=1)
    seen, layer = [], patcher.model.diffusion_model.get_submodule(coarse.layers.deembedding)
    handle = layer.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        with torch.inference_mode(), coarse._hooked(None, 6, {}) as leaving:
            family.plain_forward(patcher, resizing.reduced(x), torch.full((1,), SIGMA), family.captions((5,)))
            own = layer(leaving[0])
    finally:
        handle.remove()
    assert leaving[0].shape[:2] == (1, 6)
    whole = seen[0]
    starts = [k for k in range(whole.shape[1] - 5) if torch.allclose(whole[:, k : k + 6], own, rtol=1e-4, atol=1e-5)]
    assert len(starts) == 1
    assert starts[0] == (32 if family.name == "z_image" else 5 if family.name == "lumina2" else 0)


def test_the_lora_of_a_call_is_the_same_change_of_the_weights():
    patcher, coarse, patch = prepared(FLUX)
    resizing, x = PatchResizing(patch, 2), latent(FLUX, patch)
    generator = torch.Generator().manual_seed(4)
    names = ["double_blocks.1.img_mlp.0", "single_blocks.2.linear2"]
    lora = {}
    for name in names:
        shape = patcher.model.diffusion_model.get_submodule(name).weight.shape
        lora[name] = (
            torch.randn(3, shape[1], generator=generator) * 0.2, torch.randn(shape[0], 3, generator=generator) * 0.2
        )  # fmt: skip
    found = estimate(FLUX, patcher, coarse, x, CoarseAdapter(resizing), lora)
    plain = estimate(FLUX, patcher, coarse, x, CoarseAdapter(resizing))
    with torch.inference_mode():
        for name in names:
            patcher.model.diffusion_model.get_submodule(name).weight.add_(lora[name][1] @ lora[name][0])
    expected = estimate(FLUX, patcher, coarse, x, CoarseAdapter(resizing))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    patcher, coarse, patch = prepared(FLUX)
    before, x = weights(patcher), latent(FLUX, patch)
    adapter = CoarseAdapter(PatchResizing(patch, 2), None, moved(PatchAdapter(4 * 16, 64)))
    lora = {"single_blocks.0.linear1": (torch.zeros(1, 64), torch.zeros(1, 1))}

    def denoise(noisy, level):
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            coarse(denoise, x, torch.full((2,), SIGMA), adapter, lora, {})
    else:
        estimate(FLUX, patcher, coarse, x, adapter)
    assert_same_weights(patcher, before)
    hooks = [m for m in patcher.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_what_is_refused():
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward, shape_of

    patcher, coarse, patch = prepared(FLUX)
    with pytest.raises(InvalidInputError, match="multiples of 4"):
        estimate(FLUX, patcher, coarse, latent(FLUX, patch, rows=3), CoarseAdapter(PatchResizing(patch, 2)))
    (hidream,) = [family for family in SAMPLED_ONLY if family.name == "hidream"]
    for refused in (CoarseForward, lambda model: shape_of(model, "")):
        with pytest.raises(UnsupportedModelError, match="patches of another size|is not supported|Expected a"):
            refused(hidream.build())


def test_a_shape_says_what_adapters_must_fit():
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import shape_of

    assert vars(shape_of(tiny_flux(), "abc")) == {
        "family": "flux", "identity": "abc", "patch": 2, "channels": 4, "width": 64
    }  # fmt: skip

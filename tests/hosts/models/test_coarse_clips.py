"""Coarse calls and their training on clips of Wan, on tiny random models of ComfyUI's own class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.coarse_noise import matched_noise
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.distillation.examples import Examples
from blockskip_pack.blockskip_core.distillation.loop import DistillationResult, distill
from blockskip_pack.blockskip_core.distillation.settings import DistillationSettings

from ..tiny_families import FAMILIES
from ..tiny_flux import assert_same_weights, weights
from .test_coarse_distillation import opened

pytestmark = pytest.mark.usefixtures("comfyui")

FRAMES, SIGMA = 3, 0.7
each_wan = pytest.mark.parametrize(
    "wan", [one for one in FAMILIES if one.family == "wan"], ids=lambda family: family.name
)


def clips(wan, count=2, rows=8, columns=12):
    shape = (count, wan.latent_shape[0] * FRAMES, rows, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def with_larger_patches(wan, own, resizing):
    """ComfyUI's own class built with patches of twice the side, with FlexiViT's weights."""
    import comfy.ldm.wan.model
    import comfy.ops

    channels = wan.latent_shape[0]
    large = comfy.ldm.wan.model.WanModel(
        model_type="t2v", patch_size=(1, 4, 4), dim=own.dim, ffn_dim=own.ffn_dim, num_heads=own.num_heads,
        num_layers=len(own.blocks), in_dim=channels, out_dim=channels, freq_dim=own.freq_dim, text_dim=own.text_dim,
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    state = dict(own.state_dict())
    state["patch_embedding.weight"] = resizing.embedding_weight(state["patch_embedding.weight"][:, :, 0])[:, :, None]
    for name in ("head.head.weight", "head.head.bias"):
        patches = state[name].reshape(2, 2, channels, -1).permute(3, 2, 0, 1)
        state[name] = resizing.enlarged(patches).permute(2, 3, 1, 0).reshape(16 * channels, -1)
    state["head.head.bias"] = state["head.head.bias"].flatten()
    large.load_state_dict(state)
    return large


@each_wan
@pytest.mark.parametrize("kind", ["nearest", "bilinear"])
def test_a_coarse_call_is_that_of_wan_with_patches_of_twice_the_side(wan, kind):
    """Positions are stretched in space by the host's own options, and not in time."""
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward

    patcher, resizing, x = wan.build(), PatchResizing(2, 2, kind), clips(wan)
    large, coarse = with_larger_patches(wan, patcher.model.diffusion_model, resizing), CoarseForward(patcher)
    sigma = torch.full((2,), SIGMA)
    ratio, level = matched_noise(sigma, resizing.noise_share)
    ((text, _),) = wan.captions((5,))[0]
    stretched = {"rope_options": {"scale_x": 2.0, "scale_y": 2.0, "shift_x": 0.5, "shift_y": 0.5}}
    scaled = x * ratio[:, None, None, None]
    with torch.inference_mode():
        found = coarse(
            lambda noisy, t: wan.plain_forward(patcher, noisy, t, wan.captions((5,)) * 2), x, sigma,
            CoarseAdapter(resizing), {}, {},
        )  # fmt: skip
        velocity = large(
            scaled.unflatten(1, (-1, FRAMES)), patcher.model.model_sampling.timestep(level), text.expand(2, -1, -1),
            transformer_options=stretched,
        ).flatten(1, 2)  # fmt: skip
        elsewhere = large(
            scaled.unflatten(1, (-1, FRAMES)), patcher.model.model_sampling.timestep(level), text.expand(2, -1, -1)
        ).flatten(1, 2)
    expected = resizing.carried(scaled) - level[:, None, None, None] * velocity
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity, elsewhere, atol=1e-4), "positions matter"


def test_a_training_on_clips_lowers_the_held_out_error_and_leaves_the_model_as_it_was():
    from blockskip_pack.blockskip_core.hosts.models.coarse_distillation import distilling

    patcher, dit, parts, clean = opened(next(one for one in FAMILIES if one.name == "wan21"), frames=FRAMES)
    before, result = weights(patcher), DistillationResult()
    settings = DistillationSettings(steps=10, batch_size=2, learning_rate=8e-3, warmup_steps=2, validate_every=10)
    with distilling(dit, parts) as model:
        distill(model, Examples(clean[:3], [0, 1, 2], lambda u: u, 0), settings, result=result)
    means = [sum(errors) / len(errors) for _, errors in result.measured]
    assert means[-1] < means[0] < sum(result.untrained) / len(result.untrained)
    assert_same_weights(patcher, before)


@each_wan
def test_a_count_of_pictures_gives_the_operations_of_a_clip(wan):
    from blockskip_pack.blockskip_core.accounting.measuring import Counting
    from blockskip_pack.blockskip_core.hosts.models.counted_calls import counted_operations
    from blockskip_pack.blockskip_core.hosts.models.weightless_dit import WeightlessDit

    dit = replace(wan, latent_shape=(wan.latent_shape[0] * FRAMES, 8, 12)).hosted(wan.build(), (5,))
    noisy = torch.empty(1, *clips(wan).shape[1:], device="meta")
    weightless = WeightlessDit.of(dit)
    with torch.inference_mode(False), torch.no_grad(), weightless.running({}) as denoise, Counting() as counting:
        denoise(noisy, torch.empty(1, device="meta"), [0])
    assert dit.image_tokens(8, 12) == FRAMES * 24
    assert counted_operations(dit).own(FRAMES * 24) == pytest.approx(counting.operations, rel=1e-6)


def test_a_first_frame_that_is_given_is_refused_in_a_coarse_step():
    """Wan 2.2 5B's image to video: that frame is clean and has a noise level of its own, so it must not be rescaled."""
    from ..sampling.test_dynamic_patches import dynamic, sampled

    wan = next(one for one in FAMILIES if one.name == "wan22")
    latent = clips(wan, count=1, rows=16, columns=24).unflatten(1, (-1, FRAMES))
    mask = torch.ones(1, 1, FRAMES, 16, 24)
    mask[:, :, 0] = 0.0
    with pytest.raises(ValueError, match="Coarse steps take text conditionings only, got denoise_mask"):
        sampled(dynamic(wan.build(), "2-4: 2", family=wan), wan, latent=latent, noise_mask=mask)

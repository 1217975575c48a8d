"""RALU's stages in ComfyUI's sampler, compared with core's own Euler, a hand-written loop, and core's EasyCache."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError
from blockskip_pack.blockskip_core.ralu.noise_matching import restarted, seeded_noise
from blockskip_pack.blockskip_core.ralu.regions import choose_regions, gradient_scores
from blockskip_pack.blockskip_core.ralu.timestep_matching import PRESETS, StagePlan, solved_plan
from blockskip_pack.blockskip_core.ralu.token_grid import MixedGrid, groups_of, latent_of_groups, upsampled

from ..followed_families import PLACED
from ..tiny_families import FAMILIES, FLUX
from ..tiny_flux import assert_same_weights, captions, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

PLAN = StagePlan((2, 3, 2), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.025)
GRID = (2, 3)  # of coarse tokens
each_family = pytest.mark.parametrize("family", PLACED, ids=lambda family: family.name)


def each_family_with_one_of(name, values):
    """Every family with one of the values, in turn."""
    pairs = [(family, values[place % len(values)]) for place, family in enumerate(PLACED)]
    return pytest.mark.parametrize(("family", name), pairs, ids=[f"{family.name}-{value}" for family, value in pairs])


@cache
def side_of_a_token(family):
    """In cells of the latent."""
    from blockskip_pack.blockskip_core.hosts.families.sampled_families import positions_of

    return positions_of(family.build())[1]


def empty(family=FLUX, batch=1, patch=2):
    patch = side_of_a_token(family) if family is not FLUX else patch
    shape = (family.latent_shape[0], *((1,) if family.frames else ()), 2 * patch * GRID[0], 2 * patch * GRID[1])
    return torch.zeros(batch, *shape)


def sample(patcher, family=FLUX, *, plan=PLAN, latent=None, cfg=1.0, seed=3, ratio=0.34, on_step=None, **changes):
    from blockskip_pack.blockskip_core.hosts.sampling.early_regions import RegionChoice
    from blockskip_pack.blockskip_core.hosts.sampling.region_adaptive import RegionAdaptiveSampler

    positive, negative = changes.pop("conditionings", None) or family.captions((5, 5), seed=4)
    positive = changes.pop("positive", positive)
    batch_indices = changes.pop("batch_indices", None)
    regions = RegionChoice(**{"method": "latent gradient", "ratio": ratio, **changes})
    latent = empty(family) if latent is None else latent
    sampler = RegionAdaptiveSampler(patcher, plan, regions)
    return sampler.sample(positive, negative, cfg, latent, seed, batch_indices=batch_indices, on_step=on_step)


def core_euler(patcher, family, sigmas, latent, cfg, seed=3):
    import comfy.sample
    import comfy.samplers

    positive, negative = family.captions((5, 5), seed=4)
    return comfy.sample.sample_custom(
        patcher, comfy.sample.prepare_noise(latent, seed), cfg, comfy.samplers.sampler_object("euler"),
        torch.FloatTensor(sigmas), positive, negative, latent, disable_pbar=True, seed=seed,
    )  # fmt: skip


def test_no_generator_of_the_host_is_seeded():
    torch.manual_seed(123)
    sample(FLUX.build())
    assert torch.initial_seed() == 123


@each_family_with_one_of("cfg", (1.0, 4.0))
def test_one_stage_is_core_s_euler_bit_for_bit(family, cfg):
    patcher, latent, plan = family.build(), empty(family, batch=2), solved_plan((4,), (1.0,))
    found = sample(patcher, family, plan=plan, latent=latent, cfg=cfg)
    assert torch.equal(found.latent, core_euler(patcher, family, plan.sigmas[0], latent, cfg))
    assert found.tokens == (24,)


@each_family
def test_three_stages_on_every_family(family):
    """Two non-square pictures with guidance: shapes, token counts, and equal results from equal seeds."""
    patcher, latent = family.build(), empty(family, batch=2)
    found = sample(patcher, family, latent=latent, cfg=4.0)
    assert found.latent.shape == latent.shape
    assert bool(found.latent.isfinite().all())
    assert found.tokens == (6, 12, 24)
    cells = 8 if family.name == "flux" else patcher.model.latent_format.spacial_downscale_ratio
    assert found.overlay.shape == (2, latent.shape[-2] * cells, latent.shape[-1] * cells, 3)
    assert torch.equal(sample(patcher, family, latent=latent, cfg=4.0).latent, found.latent)
    assert not torch.equal(sample(patcher, family, latent=latent, cfg=4.0, seed=4).latent, found.latent)
    assert not torch.equal(found.latent[0], found.latent[1])


def euler(denoise, state, sigmas):
    """Euler's method, written out; returns the last state and the last clean estimate."""
    sigmas = torch.FloatTensor(sigmas)
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        clean = denoise(state, now * torch.ones(len(state)))
        state = state + (state - clean) / now * (then - now)
    return state, clean


def test_three_stages_against_a_loop_written_by_hand():
    """On FLUX.1: half the side, then tokens of two sizes, then full size; noise in between."""
    from blockskip_pack.blockskip_core.hosts.sampling.token_strips import TokenStrips

    patcher, latent, seed, ratio = tiny_flux(), empty(batch=2), 3, 0.34
    found = sample(patcher, latent=latent, seed=seed, ratio=ratio)
    positive, _ = FLUX.captions((5, 5), seed=4)
    plain = partial(FLUX.plain_forward, patcher)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        coarse, clean = euler(lambda x, t: plain(x, t, [positive] * 2), noise[..., ::2, ::2], PLAN.sigmas[0])
        nowhere = torch.zeros(2, *GRID, dtype=torch.bool)
        scores = gradient_scores(clean, GRID)
        fine = choose_regions(scores, ratio, None, seeded_noise(scores.shape, seed, 0))

        def handed_over(state, before, after, number):
            groups = groups_of(state, 2)
            flags = before.flatten(1), after.flatten(1)
            added = seeded_noise(groups.shape, seed, number)
            return latent_of_groups(restarted(groups, *flags, PLAN.restarts[number - 1], added), GRID[1], 2)

        from .test_token_strips import through_the_wrapper

        strips = TokenStrips(patcher)
        strips.grid = MixedGrid(fine)
        given = text_of(positive)

        def mixed_denoise(x, t):
            return through_the_wrapper(FLUX, strips, x, t, given)

        mixed, _ = euler(mixed_denoise, handed_over(upsampled(coarse, 2), nowhere, fine, 1), PLAN.sigmas[1])
        full = handed_over(mixed, fine, ~nowhere, 2)
        result, _ = euler(lambda x, t: plain(x, t, [positive] * 2), full, PLAN.sigmas[2])
        expected = patcher.model.process_latent_out(result)
    torch.testing.assert_close(found.latent, expected, rtol=1e-5, atol=1e-5)


def text_of(conditioning):
    """The tiny FLUX.1's arguments for two pictures."""
    ((text, settings),) = conditioning
    return FLUX.extra(text.repeat(2, 1, 1), [settings] * 2)


def test_all_regions_early_is_the_full_grid():
    assert sample(tiny_flux(), ratio=1.0).tokens == (6, 24, 24)
    assert sample(tiny_flux(), ratio=0.0).tokens == (6, 6, 24)


def test_two_stages_go_from_half_the_side_to_full_size():
    found = sample(tiny_flux(), plan=solved_plan((2, 2), (0.3, 1.0)))
    assert found.tokens == (6, 24)
    assert bool(found.latent.isfinite().all())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run(preset):
    steps = []
    found = sample(tiny_flux(), plan=PRESETS[preset], on_step=lambda step, *_: steps.append(step))
    assert bool(found.latent.isfinite().all())
    assert steps == list(range(sum(PRESETS[preset].steps)))


def test_previews_come_with_every_step_of_every_stage():
    seen = []
    sample(tiny_flux(), on_step=lambda step, clean, noisy, total: seen.append((step, tuple(clean.shape), total)))
    small, full = (1, 4, 4, 6), (1, 4, 8, 12)
    assert seen == [(step, small if step < 2 else full, 7) for step in range(7)]


def test_the_first_picture_of_a_batch_is_that_of_a_batch_of_one_after_the_first_noise():
    """The noise at restarts is seeded per picture; the initial noise is core's."""
    patcher = tiny_flux()
    both = sample(patcher, latent=empty(batch=2)).latent
    alone = sample(patcher, latent=empty(batch=1)).latent
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_lora_acts_in_every_stage():
    patcher = tiny_flux()
    plain, patched = sample(patcher).latent, patcher.clone()
    change = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)) * 0.1
    patched.add_patches({"diffusion_model.img_in.weight": ("diff", (change,))})
    assert not torch.equal(sample(patched).latent, plain)
    assert torch.equal(sample(patcher).latent, plain)


def test_distilled_guidance_is_read():
    patcher = tiny_flux(guidance=True)
    runs = [sample(patcher, conditionings=captions((5, 5), guidance=guidance)).latent for guidance in (1.0, 6.0)]
    assert not torch.equal(*runs)


def test_a_mask_on_a_conditioning_leaves_coarse_tokens_whole(monkeypatch):
    """The mask's edge crosses tokens; when the last stage begins, each coarse token is still repeated four times."""
    from blockskip_pack.blockskip_core.hosts.sampling import region_adaptive

    handed_over = []

    def watched(groups, before, after, *rest):
        handed_over.append((groups, before))
        return restarted(groups, before, after, *rest)

    monkeypatch.setattr(region_adaptive, "restarted", watched)
    positive, negative = FLUX.captions((5, 5), seed=4)
    mask = torch.zeros(1, 64, 96)
    mask[:, :, :41] = 1.0
    other = FLUX.captions((7,), seed=9)[0]
    masked = [[positive[0][0], {**positive[0][1], "mask": mask}], *other]
    found = sample(tiny_flux(), conditionings=(masked, negative))
    assert bool(found.latent.isfinite().all())
    groups, fine = handed_over[1]
    assert fine.sum() == 2
    assert torch.equal(groups[~fine], groups[~fine][:, :1].expand(-1, 4, -1))
    assert not torch.equal(groups[fine], groups[fine][:, :1].expand(-1, 4, -1))


def test_forced_regions_are_refined():
    mask = torch.zeros(1, 64, 96)
    mask[0, 32:, 64:] = 1.0
    found = sample(tiny_flux(), ratio=0.0, mask=mask)
    assert found.tokens == (6, 9, 24)
    corner, rest = found.overlay[0, -1, -1], found.overlay[0, 0, 0]
    assert corner[0] > corner[2]
    assert rest[0] == rest[2]


def test_one_mask_for_each_picture_of_a_batch_or_repeated():
    masks = torch.zeros(2, 2, 3)
    masks[0, 0, 0] = masks[1, 1, 2] = 1.0
    found = sample(tiny_flux(), ratio=0.0, mask=masks, latent=empty(batch=3))
    tinted = found.overlay[:, ::32, ::32, 0] > found.overlay[:, ::32, ::32, 2]
    assert tinted.nonzero().tolist() == [[0, 0, 0], [1, 1, 2], [2, 0, 0]]


class Vae:
    """Eight pixels per cell; the first channel as grey, so that edges are where the latent has them."""

    def __init__(self):
        self.seen = []

    def decode(self, latent):
        self.seen.append(latent)
        grey = (latent[:, :1] > 0).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
        return grey.movedim(1, -1).expand(-1, -1, -1, 3)


@pytest.mark.parametrize("method", ["edges", "edges (as published)"])
def test_edges_are_found_in_the_decoded_estimate_of_half_the_side(method):
    vae, patcher, estimates = Vae(), tiny_flux(), []
    scale = patcher.model.latent_format.scale_factor
    found = sample(patcher, method=method, vae=vae, on_step=lambda step, clean, noisy, total: estimates.append(clean))
    assert found.tokens == (6, 12, 24)
    assert [tuple(latent.shape) for latent in vae.seen] == [(1, 4, 4, 6)]
    last_of_first_stage = next(x for x in reversed(estimates) if x.shape[-1] == 6)
    assert scale != 1.0
    torch.testing.assert_close(vae.seen[0], patcher.model.process_latent_out(last_of_first_stage.float()))


def test_the_early_regions_are_those_with_the_edges():
    """The decoded picture has one edge, in the upper right corner; the latent has others."""

    class Corner(Vae):
        def decode(self, latent):
            picture = torch.zeros(1, 32, 48, 3)
            picture[:, 4:12, 36:44] = 1.0
            return picture

    found = sample(tiny_flux(), method="edges", vae=Corner(), ratio=1 / 6)
    assert found.overlay.shape == (1, 64, 96, 3)
    tinted = found.overlay[0, ::32, ::32, 0] > found.overlay[0, ::32, ::32, 2]
    assert tinted.tolist() == [[False, False, True], [False, False, False]]


def test_a_latent_with_frames_is_decoded_with_them():
    qwen = next(family for family in FAMILIES if family.name == "qwen_image")

    class VideoVae(Vae):
        def decode(self, latent):
            assert latent.shape == (1, 16, 1, 4, 6)
            return super().decode(latent[:, :, 0])[:, None]

    assert sample(qwen.build(), qwen, method="edges", vae=VideoVae()).tokens == (6, 12, 24)


# --- obstacles ----------------------------------------------------------------------------------------------------


def test_a_copy_of_the_model_is_refused():
    """ComfyUI samples from one if prompts have hooks, or several GPUs share the work."""
    patcher, other = tiny_flux(), tiny_flux()

    def delegate(executor, *args, **kwargs):
        executor.class_obj = other.model
        return executor(*args, **kwargs)

    import comfy.patcher_extension

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "before ours", delegate)
    with pytest.raises(InvalidInputError, match="ComfyUI samples from a copy of it"):
        sample(patcher)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"set_area_to_bounds": True, "mask": torch.ones(1, 64, 96)}, "a mask whose bounds become an area"),
        ({"attention_mask_img_shape": (8, 8)}, "an image prompt with a mask"),
    ],
    ids=["mask bounds", "image prompt"],
)
def test_what_has_a_size_of_its_own_is_refused_before_sampling(setting, named):
    embedding, own = captions((5,))[0][0]
    with pytest.raises(InvalidInputError, match=f"takes text conditionings only, got {named}"):
        sample(tiny_flux(), positive=[[embedding, {**own, **setting}]])


def test_a_mask_without_bounds_is_taken():
    embedding, own = captions((5,))[0][0]
    masked = {**own, "mask": torch.ones(1, 64, 96), "set_area_to_bounds": False}
    assert bool(sample(tiny_flux(), positive=[[embedding, masked]]).latent.isfinite().all())


def test_a_controlnet_on_the_model_is_refused():
    class Hint:
        model_patch = None

        def __call__(self, args):
            return args

    patcher = tiny_flux()
    patcher.set_model_patch(Hint(), "double_block")
    with pytest.raises(
        UnsupportedModelError, match="cannot follow a ControlNet or another model in its blocks.*got Hint"
    ):
        sample(patcher)


def test_a_picture_of_a_batch_can_be_made_alone():
    together = sample(tiny_flux(), latent=empty(batch=2), batch_indices=[3, 4]).latent
    alone = sample(tiny_flux(), latent=empty(batch=1), batch_indices=[4]).latent
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[:1], alone, atol=1e-2)


def test_a_node_that_divides_the_batch_is_told():
    patcher = tiny_flux()

    def one_by_one(apply_model, call):
        return torch.cat([apply_model(call["input"][k : k + 1], call["timestep"][k : k + 1], **{
            name: value[k : k + 1] if isinstance(value, torch.Tensor) and len(value) == 2 else value
            for name, value in call["c"].items()
        }) for k in range(len(call["input"]))])  # fmt: skip

    patcher.set_model_unet_function_wrapper(one_by_one)
    with pytest.raises(InvalidInputError, match="The model was called on 1 pictures at a time, but 2 belong together"):
        sample(patcher, latent=empty(batch=2))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_that_is_no_share_is_refused_before_sampling(ratio):
    with pytest.raises(InvalidInputError, match="share of early regions must be between 0 and 1"):
        sample(tiny_flux(), ratio=ratio)


def test_masks_of_two_axes_and_elsewhere_are_taken():
    mask = torch.zeros(64, 96)
    mask[:32, :32] = 1.0
    found = sample(tiny_flux(), ratio=0.0, mask=mask)
    tinted = found.overlay[0, ::32, ::32, 0] > found.overlay[0, ::32, ::32, 2]
    assert tinted.nonzero().tolist() == [[0, 0]]


# --- caches of other nodes ----------------------------------------------------------------------------------------


def with_easycache(patcher, threshold):
    import asyncio

    from comfy_extras.nodes_easycache import comfy_entrypoint

    extension = comfy_entrypoint()
    node = asyncio.run(extension.get_node_list())[0]
    assert node.GET_SCHEMA().node_id == "EasyCache"
    return node.execute(patcher, threshold, 0.0, 1.0, False)[0]


def forwards(patcher, run):
    """Widths of the inputs of the model's own forward while ``run`` runs."""
    seen = []
    handle = patcher.model.diffusion_model.img_in.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    try:
        return run(), seen
    finally:
        handle.remove()


def test_easycache_that_never_skips_changes_nothing():
    patcher = tiny_flux()
    plain, cached = sample(patcher).latent, sample(with_easycache(patcher, 0.0)).latent
    assert torch.equal(plain, cached)


def test_easycache_begins_anew_with_every_stage():
    """It skips as much as it can: every stage still starts with full steps, and none ends with another's tokens."""
    plan = StagePlan((5, 6, 7), (0.3, 0.45, 1.0), (5.0, 2.6, 2.2), 0.025)
    patcher = with_easycache(tiny_flux(), 3.0)
    found, seen = forwards(patcher, lambda: sample(patcher, plan=plan))
    assert bool(found.latent.isfinite().all())
    per_stage = [seen.count(tokens) for tokens in found.tokens]
    assert found.tokens == (6, 12, 24)
    assert sum(per_stage) == len(seen)
    assert all(2 <= full < steps for full, steps in zip(per_stage, plan.steps, strict=True))


def test_a_cache_that_watches_the_step_sees_every_stage_begin():
    """Caches that reset at the first noise level of a run find it in the run's list."""
    import comfy.patcher_extension

    firsts, patcher = [], tiny_flux()

    def wrapper(executor, *args, **kwargs):
        options = args[5]
        firsts.append(bool(options["sample_sigmas"][0] == options["sigmas"][0]))
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "watch", wrapper)
    sample(patcher)
    assert firsts == [True, False, True, False, False, True, False]


# --- cleaning up, and refused inputs ------------------------------------------------------------------------------


@each_family_with_one_of("step", (0, 3, 6))
def test_a_run_that_is_stopped_leaves_the_model_as_it_was(family, step):
    import comfy.model_management

    patcher = family.build()
    before, latent = weights(patcher), empty(family)
    expected = core_euler(patcher, family, (1.0, 0.5, 0.0), latent, 1.0)

    def stop(now, *_):
        if now == step:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patcher, family, on_step=stop_at_next(stop))
    assert torch.equal(core_euler(patcher, family, (1.0, 0.5, 0.0), latent, 1.0), expected)
    assert_same_weights(patcher, before)
    assert not any(module._forward_pre_hooks for module in patcher.model.modules())
    assert not patcher.wrappers
    assert not patcher.object_patches


def stop_at_next(stop):
    """Cancel takes effect at the next step, or at once after the last."""
    import comfy.model_management

    def on_step(now, *rest):
        stop(now, *rest)
        if now == 6:
            comfy.model_management.throw_exception_if_processing_interrupted()

    return on_step


@pytest.mark.parametrize("setting", ["area", "control", "gligen", "reference_latents", "concat_latent_image"])
@pytest.mark.parametrize("side", [0, 1])
def test_conditionings_with_a_size_of_their_own_are_refused_before_anything_runs(setting, side):
    conditionings = FLUX.captions((5, 5), seed=4)
    conditionings[side] = [[conditionings[side][0][0], {**conditionings[side][0][1], setting: object()}]]
    patcher = tiny_flux()
    with pytest.raises(InvalidInputError, match="takes text conditionings only"):
        sample(patcher, conditionings=conditionings)


@pytest.mark.parametrize("shape", [(1, 4, 6, 12), (1, 4, 8, 10)])
def test_a_size_that_coarse_tokens_do_not_fill_is_refused(shape):
    with pytest.raises(InvalidInputError, match=f"multiples of 32 px.*got {shape[3] * 8} x {shape[2] * 8}"):
        sample(tiny_flux(), latent=torch.zeros(shape))


def test_a_video_is_refused():
    wan = next(family for family in FAMILIES if family.name == "wan21")
    with pytest.raises(InvalidInputError, match="single pictures, got a latent of 5 frames"):
        sample(wan.build(), wan, latent=torch.zeros(1, 16, 5, 8, 12))


def test_a_model_that_is_no_flow_is_refused():
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    patcher = tiny_flux().clone()
    patcher.add_object_patch("model_sampling", Sampling())
    with pytest.raises(UnsupportedModelError, match="cannot follow another kind of prediction than flow matching"):
        sample(patcher)


def test_edges_need_a_vae():
    with pytest.raises(InvalidInputError, match="no VAE came in"):
        sample(tiny_flux(), method="edges")


def test_fewer_stages_need_no_regions_and_no_vae():
    assert sample(tiny_flux(), method="edges", plan=solved_plan((2, 2), (0.3, 1.0))).tokens == (6, 24)


def test_an_unknown_method_is_refused():
    with pytest.raises(InvalidInputError, match="regions must be one of"):
        sample(tiny_flux(), method="sharpness")

"""Coarse steps in ComfyUI's own samplers: own steps are the plain model's, one decision for both passes, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.coarse_estimate import CoarseAdapter
from blockskip_pack.blockskip_core.ddit.connection import PatchStatistics
from blockskip_pack.blockskip_core.ddit.error_table import ErrorTable
from blockskip_pack.blockskip_core.ddit.operations import StepOperations
from blockskip_pack.blockskip_core.ddit.patch_adapter import PatchAdapter
from blockskip_pack.blockskip_core.ddit.patch_resizing import PatchResizing
from blockskip_pack.blockskip_core.ddit.plans import DecidedWhileSampling, TypedWindows
from blockskip_pack.blockskip_core.ddit.scheduler import SchedulerSettings
from blockskip_pack.blockskip_core.ddit.trained_patches import TrainedPatches, TrainedScale
from blockskip_pack.blockskip_core.errors import InvalidInputError, PatchAdapterError, UnsupportedModelError

from ..tiny_families import FAMILIES, FLUX
from ..tiny_flux import assert_same_weights, tiny_flux, weights

pytestmark = pytest.mark.usefixtures("comfyui")

WAN, FRAMES = next(family for family in FAMILIES if family.name == "wan21"), 3
CLIPS = replace(WAN, name="wan21, clips")
each_family = pytest.mark.parametrize("family", [*FAMILIES, CLIPS], ids=lambda family: family.name)
SAMPLERS = ("euler", "heun", "dpmpp_2m", "uni_pc")
TABLE = ErrorTable((0.2, 0.8), (0.3, 0.1))


def adapters(patcher, family=FLUX, scales=(2,), seed=0, lora=True):
    """Random adapters that belong to a MODEL."""
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import shape_of
    from blockskip_pack.blockskip_core.hosts.models.identity import module_identity
    from blockskip_pack.blockskip_core.hosts.models.residency import unload

    unload(patcher)
    base = shape_of(patcher, module_identity(patcher.model.diffusion_model))
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for scale in scales:
        resizing = PatchResizing(base.patch, scale)
        patches = PatchAdapter(base.channels * resizing.side**2, base.width, seed=seed)
        with torch.no_grad():
            for tensor in patches.parameters():
                tensor += torch.randn(tensor.shape, generator=generator) * 0.02
        side = 4 * resizing.side
        statistics = PatchStatistics.of(torch.randn(8, base.channels, side, side, generator=generator), resizing)
        layers = {}
        if lora and family is FLUX:
            layers["single_blocks.1.linear2"] = (
                torch.randn(2, 192, generator=generator) * 0.1, torch.randn(64, 2, generator=generator) * 0.1
            )  # fmt: skip
        made[scale] = TrainedScale(CoarseAdapter(resizing, statistics, patches), layers, TABLE, TABLE)
    return TrainedPatches(base, made, StepOperations(0.0, 100.0, 1.0, 5))


def empty(family=FLUX, batch=1, patch=2, scale=4):
    frames = (FRAMES if family is CLIPS else 1,) if family.frames else ()
    return torch.zeros(batch, family.latent_shape[0], *frames, 2 * scale * patch, 3 * scale * patch)


def sampled(
    patcher,
    family=FLUX,
    *,
    latent=None,
    sampler="euler",
    steps=6,
    cfg=1.0,
    seed=3,
    conditionings=None,
    sigmas=None,
    **more,
):
    import comfy.sample
    import comfy.samplers

    latent = empty(family) if latent is None else latent
    positive, negative = conditionings or family.captions((5, 5), seed=4)
    chosen = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    sigmas = torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            patcher, comfy.sample.prepare_noise(latent, seed), cfg, chosen, sigmas, positive, negative, latent,
            disable_pbar=True, seed=seed, **more,
        )  # fmt: skip


def dynamic(patcher, text, trained=None, on_step=None, scales=(2,), family=FLUX):
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches

    trained = trained or adapters(patcher, family, scales)
    return DynamicPatches(patcher, trained, TypedWindows(text, list(trained.scales)), on_step).patcher


@pytest.mark.parametrize(
    ("sampler", "cfg", "family"),
    [*zip(SAMPLERS, (1.0, 4.0, 4.0, 1.0), [FLUX] * 4, strict=True), ("euler", 4.0, CLIPS)],
)
def test_steps_with_the_models_own_patches_are_the_plain_model_bit_for_bit(sampler, cfg, family):
    patcher, settings = family.build(), {"latent": empty(family, batch=2), "sampler": sampler, "cfg": cfg}
    plain = sampled(patcher, family, **settings)
    assert torch.equal(sampled(dynamic(patcher, "", family=family), family, **settings), plain)
    assert not torch.equal(sampled(dynamic(patcher, "3: 2", family=family), family, **settings), plain)
    assert torch.equal(sampled(patcher, family, **settings), plain)


def test_the_plain_model_with_a_lora_too():

    patcher = tiny_flux()
    key = "diffusion_model.single_blocks.0.linear1.weight"
    shape = patcher.model.state_dict()[key].shape
    diff = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.1
    trained = adapters(patcher)
    with_lora = patcher.clone()
    with_lora.add_patches({key: ("diff", (diff,))})
    plain = sampled(with_lora)
    assert not torch.equal(plain, sampled(patcher))
    assert torch.equal(sampled(dynamic(with_lora, "", trained)), plain)
    assert not torch.equal(sampled(dynamic(with_lora, "3: 2", trained)), sampled(dynamic(patcher, "3: 2", trained)))


@each_family
def test_coarse_steps_on_every_family(family):
    """Non-square pictures with guidance: shape, finite, reproducible, fewer tokens in the coarse steps only."""
    patcher = family.build()
    trained = adapters(patcher, family, (2, 4), lora=False)
    latent, seen = empty(family, batch=2, patch=trained.base.patch), []
    found = dynamic(patcher, "2-3: 2, 4: 4", trained, family=family)
    layer = found.model.diffusion_model.get_submodule(_embedding(found))
    handle = layer.register_forward_hook(lambda _, args, output: seen.append(_tokens(output)))
    try:
        picture = sampled(found, family, latent=latent, cfg=4.0, steps=5)
    finally:
        handle.remove()
    assert picture.shape == latent.shape
    assert bool(picture.isfinite().all())
    assert [*dict.fromkeys(seen)] == [tokens * (FRAMES if family is CLIPS else 1) for tokens in (96, 24, 6)]
    assert torch.equal(sampled(found, family, latent=latent, cfg=4.0, steps=5), picture)


def _embedding(patcher):
    from blockskip_pack.blockskip_core.hosts.families.registry import adapter_for

    return adapter_for(patcher).patch_layers().embedding


def _tokens(output):
    return output.shape[1] if output.ndim == 3 else output.flatten(2).shape[2]


@each_family
def test_euler_with_coarse_steps_is_a_hand_written_loop(family):
    """The reference calls the coarse forward itself, with guidance and without a sampler."""
    import comfy.sample
    from blockskip_pack.blockskip_core.hosts.models.coarse_forward import CoarseForward

    patcher = family.build()
    trained = adapters(patcher, family)
    latent = empty(family, patch=trained.base.patch, scale=2)
    found = sampled(dynamic(patcher, "1-2: 2, 5: 2", trained), family, latent=latent, cfg=3.0)
    x = comfy.sample.prepare_noise(latent, 3)
    x = x.flatten(1, 2) if family.frames else x
    positive, negative = family.captions((5, 5), seed=4)
    patcher = family.build()
    coarse, sigmas = CoarseForward(patcher), torch.linspace(1, 0, 7)
    coarse.prepare(patcher)

    def estimate(prompt, step):
        denoise = partial(family.plain_forward, patcher, conditionings=[prompt])
        level = sigmas[step : step + 1]
        if step not in (0, 1, 4):
            return denoise(x, level)
        entry = trained.scales[2]
        with torch.inference_mode():
            return coarse(lambda noisy, sigma: denoise(noisy, sigma), x, level, entry.coarse, entry.lora, {})

    for step in range(6):
        towards, away = estimate(positive, step), estimate(negative, step)
        clean = away + 3.0 * (towards - away)
        x = x + (x - clean) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
    expected = patcher.model.process_latent_out(x.reshape(latent.shape))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_one_decision_for_both_passes_and_for_all_calls_of_a_step():
    patcher, records = tiny_flux(), []
    sampled(
        dynamic(patcher, "2: 2, 4-5: 2", on_step=lambda record: records.append(list(record.scales))),
        cfg=4.0,
        sampler="heun",
    )
    assert records[-1] == [1, 2, 1, 2, 2, 1]
    assert [len(scales) for scales in records] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("family", [FLUX, CLIPS], ids=lambda family: family.name)
def test_previews_of_coarse_steps_are_the_full_size_estimates_that_euler_follows(family):
    patcher, seen = family.build(), []
    sampled(
        dynamic(patcher, "2-4: 2", family=family), family, cfg=4.0,
        callback=lambda step, clean, x, total: seen.append((step, total, clean.clone(), x.clone())),
    )  # fmt: skip
    assert [entry[:2] for entry in seen] == [(step, 6) for step in range(6)]
    sigmas = torch.linspace(1, 0, 7)
    for (step, _, clean, x), (*_, following) in zip(seen, seen[1:], strict=False):
        assert clean.shape == empty(family).shape
        assert bool(clean.isfinite().all())
        expected = x + (x - clean) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        torch.testing.assert_close(following, expected, rtol=1e-4, atol=1e-5)


def test_decisions_while_sampling_see_latents_and_estimates_after_guidance():
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches

    patcher, seen = tiny_flux(), []

    class Choice:
        def possible(self):
            return (1, 2)

        def decide(self, step, sigma, latent):
            seen.append((step, round(sigma, 4), tuple(latent.shape)))
            return 1

        def made(self, sigma, clean):
            seen.append(clean.clone())

    class Plan:
        def begin(self, sigmas, tokens, frames):
            assert (len(sigmas), tokens, frames) == (7, 96, 1)
            return Choice()

    sampled(DynamicPatches(patcher, adapters(patcher), Plan()).patcher, cfg=4.0)
    assert [entry for entry in seen if isinstance(entry, tuple)][:2] == [
        (0, 1.0, (1, 4, 16, 24)),
        (1, 0.8333, (1, 4, 16, 24)),
    ]
    plain, estimates = [], [entry for entry in seen if not isinstance(entry, tuple)]
    sampled(patcher, cfg=4.0, callback=lambda step, clean, x, total: plain.append(clean.clone()))
    assert all(torch.equal(a, b) for a, b in zip(estimates, plain, strict=True))


@pytest.mark.parametrize("family", [FLUX, CLIPS], ids=lambda family: family.name)
def test_the_published_scheduler_runs(family):
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import DynamicPatches

    patcher, records = family.build(), []
    for criterion in ("third difference", "third difference (as published)"):
        plan = DecidedWhileSampling(SchedulerSettings(tau=100.0, criterion=criterion, first_own=0), {2: 4})
        trained = adapters(patcher, family)
        made = DynamicPatches(patcher, trained, plan, lambda record: records.append((record.tokens, [*record.scales])))
        sampled(made.patcher, family, latent=empty(family), steps=8)
        assert records[-1][1][-2] == 2
        assert records[-1][0] == 96 * (FRAMES if family is CLIPS else 1)


@pytest.mark.parametrize(
    ("first", "windows", "start"),
    [("cache", "6-11: 2", 0.0), ("patches", "6-11: 2", 0.3), ("cache", "2: 2, 4: 2, 6: 2, 8: 2, 10: 2, 12: 2", 0.3)],
)
def test_easy_cache_combines_in_either_order(first, windows, start):
    """It answers own and coarse steps, also those that alternate, and a threshold of 0 changes nothing."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model, threshold):
        return EasyCacheNode.execute(model, threshold, start, 1.0, False)[0]

    def made(threshold):
        if first == "cache":
            return dynamic(cached(patcher, threshold), windows, trained)
        return cached(dynamic(patcher, windows, trained), threshold)

    patcher = tiny_flux(dtype=torch.bfloat16)
    trained, seen = adapters(patcher), []
    plain = sampled(dynamic(patcher, windows, trained), steps=16)
    assert torch.equal(sampled(made(0.0), steps=16), plain)
    handle = patcher.model.diffusion_model.img_in.register_forward_hook(
        lambda _, args, output: seen.append(output.shape[1])
    )
    try:
        found = sampled(made(5.0), steps=16)
    finally:
        handle.remove()
    assert bool(found.isfinite().all())
    assert 0 < seen.count(24) < 6
    assert 0 < seen.count(96) < 10


def test_a_cache_that_answers_the_first_coarse_call_is_refused():
    import comfy.patcher_extension

    patcher = tiny_flux()
    answering = patcher.clone()
    answering.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "answers", lambda executor, x, *args, **kwargs: x
    )
    with pytest.raises(InvalidInputError, match="Another node answered the first coarse call"):
        sampled(dynamic(answering, "2: 2", adapters(patcher)))


def test_a_mask_keeps_what_it_hides():
    patcher = tiny_flux()
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :8] = 1.0
    given = torch.randn(empty().shape, generator=torch.Generator().manual_seed(6))
    found = sampled(dynamic(patcher, "2-4: 2"), latent=given, noise_mask=mask)
    torch.testing.assert_close(found[..., 8:], given[..., 8:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[..., :8], given[..., :8], atol=0.1)


@pytest.mark.parametrize("how", ["finished", "interrupted", "failed"])
def test_the_model_is_left_as_it_was(how):
    import comfy.model_management

    patcher = tiny_flux()
    before, trained = weights(patcher), adapters(patcher)

    def on_step(record):
        if len(record.scales) == 3:
            if how == "interrupted":
                raise comfy.model_management.InterruptProcessingException
            if how == "failed":
                raise RuntimeError("stop")

    made = dynamic(patcher, "2-4: 2", trained, on_step)
    if how == "finished":
        sampled(made)
    else:
        expected = comfy.model_management.InterruptProcessingException if how == "interrupted" else RuntimeError
        with pytest.raises(expected):
            sampled(made)
    assert [m for m in patcher.model.diffusion_model.modules() if m._forward_hooks or m._forward_pre_hooks] == []
    assert not patcher.wrappers
    assert_same_weights(patcher, before)
    assert all(tensor.device.type == "cpu" for pair in trained.scales[2].lora.values() for tensor in pair)
    assert torch.equal(sampled(dynamic(patcher, "", trained)), sampled(patcher))


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_sde", "lcm", "ddpm", "dpm_adaptive", "er_sde", "seeds_2"]
)
def test_samplers_that_add_noise_are_refused(sampler):
    with pytest.raises(
        InvalidInputError,
        match=r"one of these samplers, set to add no noise: euler, .*uni_pc, uni_pc_bh2, got .*\. Choose one",
    ):
        sampled(dynamic(tiny_flux(), "2: 2"), sampler=sampler)


def test_the_stages_of_ralu_are_refused():
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import require_deterministic
    from blockskip_pack.blockskip_core.hosts.sampling.region_adaptive import EulerFrom

    with pytest.raises(InvalidInputError, match="Give RALU Sampler the MODEL without Dynamic Patches"):
        require_deterministic(EulerFrom(None))


def test_churn_is_refused():
    import comfy.samplers

    with pytest.raises(InvalidInputError, match="got euler with s_churn"):
        sampled(dynamic(tiny_flux(), "2: 2"), sampler=comfy.samplers.ksampler("euler", {"s_churn": 1.0}))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # the host's deis
def test_every_sampler_on_the_list_runs_each_step_with_its_own_size():
    import comfy.samplers
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import WITHOUT_NOISE

    records: list[list[int]] = []
    made = dynamic(tiny_flux(), "2: 2, 4: 2", on_step=lambda record: records.append(list(record.scales)))
    known = {"unipc": "uni_pc", "unipc_bh2": "uni_pc_bh2"}
    for name in WITHOUT_NOISE:
        name = known.get(name, name)
        if name in comfy.samplers.SAMPLER_NAMES:
            assert bool(sampled(made, sampler=name).isfinite().all()), name
            assert records[-1] == [1, 2, 1, 2, 1, 1], name


def test_a_sampler_that_goes_back_in_noise_level_is_refused():
    made = dynamic(tiny_flux(), "2: 2")
    with pytest.raises(InvalidInputError, match="one of these samplers.*got heunpp2"):
        sampled(made, sampler="heunpp2")


def test_a_sampler_of_that_name_that_goes_back_is_refused_while_it_runs(monkeypatch):
    from blockskip_pack.blockskip_core.hosts.sampling import dynamic_patches

    monkeypatch.setattr(dynamic_patches, "WITHOUT_NOISE", (*dynamic_patches.WITHOUT_NOISE, "heunpp2"))
    with pytest.raises(InvalidInputError, match="this one goes back to an earlier one. Choose euler"):
        sampled(dynamic(tiny_flux(), "2: 2"), sampler="heunpp2")


def test_rising_noise_levels_are_refused_before_the_first_step():
    records = []
    made = dynamic(tiny_flux(), "2: 2", on_step=records.append)
    for sigmas in (torch.linspace(0, 1, 5), torch.tensor([1.0, 0.5, 0.8, 0.0])):
        with pytest.raises(
            InvalidInputError, match=r"noise levels only fall, got levels that rise from 0.* \(Flip Sigmas"
        ):
            sampled(made, sigmas=sigmas)
    assert records == []
    assert bool(sampled(made, sigmas=torch.tensor([1.0, 0.5, 0.5, 0.0])).isfinite().all())


def test_an_image_prompt_with_a_mask_is_refused_before_the_first_step():
    """As Style Model Apply makes it: the mask is over the tokens of text and picture, of which coarse steps have fewer."""
    ((text, settings),) = FLUX.captions((5,))[0]
    mask = torch.zeros(1, 6, 6)
    mask[:, :2] = -0.5
    prompt = [[text, {**settings, "attention_mask": mask, "attention_mask_img_shape": (1, 1)}]]
    patcher, records = tiny_flux(), []
    trained = adapters(patcher)
    with pytest.raises(InvalidInputError, match="only, got an image prompt with a mask. Give Style Model Apply"):
        sampled(dynamic(patcher, "3: 2", trained, records.append), conditionings=(prompt, prompt))
    assert records == []
    own = sampled(dynamic(patcher, "", trained), conditionings=(prompt, prompt))
    assert torch.equal(own, sampled(patcher, conditionings=(prompt, prompt)))
    late = [[text, {**prompt[0][1], "start_percent": 0.0, "end_percent": 1.0}]]
    with pytest.raises(InvalidInputError, match="Coarse steps take text conditionings only, got an image prompt with"):
        sampled(dynamic(patcher, "3: 2", trained), conditionings=(late, late))


WHOLE = torch.ones(1, 128, 192)
CORNER = torch.zeros(1, 128, 192)
CORNER[:, :48, :80] = 1.0


@pytest.mark.parametrize(
    ("changes", "windows", "message"),
    [
        ({"area": (6, 10, 0, 0)}, "3: 2", "multiples of 32 px, .* got 80 x 48"),
        ({"area": ("percentage", 0.75, 0.25, 0.0, 0.0)}, "3: 2", "multiples of 32 px, .* got 48 x 96"),
        ({"area": (8, 40, 0, 22)}, "3: 2", "multiples of 32 px, .* got 16 x 64"),
        (
            {"mask": CORNER, "set_area_to_bounds": True},
            "3: 2",
            "multiples of 32 px, .* got 80 x 64. Change the area or",
        ),
        ({"area": (8, 12, 0, 0)}, "3: 4", "multiples of 64 px, .* got 96 x 64"),
        ({"area": (8, 12, 3, 5)}, "3: 2", None),
        ({"mask": WHOLE, "set_area_to_bounds": True}, "3: 2", None),
        ({"mask": CORNER}, "3: 2", None),
        ({"area": (6, 10, 0, 0)}, "", None),
    ],
)
def test_prompts_of_areas(changes, windows, message):
    """The area is sampled as a picture of its own, so coarse patches must cut it too; else no step is made."""
    patcher, records = tiny_flux(), []
    (((text, settings),), (whole,)) = FLUX.captions((5, 7))
    positive = [[text, {**settings, **changes}], whole]
    made = dynamic(patcher, windows, adapters(patcher, scales=(2, 4)), records.append)
    if message:
        with pytest.raises(InvalidInputError, match=f"the area of a prompt .* {message}"):
            sampled(made, conditionings=(positive, [whole]))
        assert records == []
    else:
        assert bool(sampled(made, conditionings=(positive, [whole])).isfinite().all())


def test_an_area_of_some_steps_is_refused_in_the_first_coarse_one():
    patcher, trained = tiny_flux(), adapters(tiny_flux())
    (((text, settings),), (whole,)) = FLUX.captions((5, 7))
    limited = {**settings, "area": (6, 10, 0, 0), "start_percent": 0.0}
    early, late = ([[text, {**limited, "end_percent": end}], whole] for end in (0.4, 1.0))
    assert bool(sampled(dynamic(patcher, "5: 2", trained), conditionings=(early, [whole])).isfinite().all())
    with pytest.raises(InvalidInputError, match="the area of a prompt .* multiples of 32 px, .* got 80 x 48"):
        sampled(dynamic(patcher, "5: 2", trained), conditionings=(late, [whole]))


def test_odd_sizes_clips_of_picture_models_and_other_inputs_are_refused():
    made = dynamic(tiny_flux(), "2: 2")
    with pytest.raises(InvalidInputError, match="multiples of 32 px, .* got 240 x 128"):
        sampled(made, latent=torch.zeros(1, 4, 16, 30))
    with pytest.raises(InvalidInputError, match="not within the steps 1 to 3"):
        sampled(dynamic(tiny_flux(), "5: 2"), steps=3)
    qwen = next(family for family in FAMILIES if family.name == "qwen_image")
    with pytest.raises(UnsupportedModelError, match=r"single pictures with Qwen-Image models, .* Set the length to 1"):
        sampled(dynamic(qwen.build(), "2: 2", family=qwen), qwen, latent=torch.zeros(1, 16, 2, 16, 24))
    with pytest.raises(InvalidInputError, match="pictures and clips, got a latent of shape"):
        sampled(made, latent=torch.zeros(1, 4, 96))
    ((text, settings),) = FLUX.captions((5,))[0]
    pictured = [[text, {**settings, "reference_latents": [torch.zeros(1, 4, 8, 8)]}]]
    with pytest.raises(InvalidInputError, match="Coarse steps take text conditionings only, got ref_latents"):
        sampled(made, conditionings=(pictured, pictured))


def test_adapters_of_another_model_are_refused():
    from blockskip_pack.blockskip_core.hosts.sampling.dynamic_patches import require_fitting

    patcher = tiny_flux()
    trained = adapters(patcher)
    require_fitting(patcher, trained)
    with pytest.raises(PatchAdapterError, match="other weights of a flux model"):
        require_fitting(tiny_flux(seed=1), trained)
    with pytest.raises(PatchAdapterError, match="tokens of width 64, got a flux model of width 32"):
        require_fitting(tiny_flux(width=32), trained)
    chroma = next(family for family in FAMILIES if family.name == "chroma")
    with pytest.raises(PatchAdapterError, match="a flux model with tokens of width 64, got a chroma model"):
        require_fitting(chroma.build(), trained)


def test_changes_that_cannot_be_followed_are_refused():
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = tiny_flux()
    trained = adapters(patcher)
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model.single_blocks.0"])
    with pytest.raises(UnsupportedModelError, match="dynamic patches cannot follow compiled modules"):
        dynamic(compiled, "2: 2", trained)


def test_a_model_that_is_compiled_afterwards_is_refused_before_its_first_step():
    """Its coarse calls could be answered by a graph that was compiled for smaller pictures, in which no hook runs."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher = tiny_flux()
    compiled = dynamic(patcher, "2: 2").clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model.single_blocks.0"])
    with pytest.raises(UnsupportedModelError, match="dynamic patches cannot follow compiled modules"):
        sampled(compiled)


class PatchWithAModel:
    """A patch as of the host's nodes for ControlNets that are put on a MODEL."""

    def __call__(self, given):
        return given

    def models(self):
        return []


def with_a_controlnet(patcher):
    patcher.set_model_double_block_patch(PatchWithAModel())


def with_context_windows(patcher):
    patcher.model_options["context_handler"] = object()


def with_another_prediction(patcher):
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    patcher.add_object_patch("model_sampling", Sampling())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_controlnet, "a ControlNet or another model in its blocks on the MODEL, got PatchWithAModel"),
        (with_context_windows, "context windows"),
        (with_another_prediction, "another kind of prediction than flow matching"),
    ],
)
def test_what_is_put_on_the_model_afterwards_is_refused_before_its_first_step(change, message):
    patcher, records = tiny_flux(), []
    changed = dynamic(patcher, "2: 2", on_step=records.append).clone()
    change(changed)
    with pytest.raises(UnsupportedModelError, match=f"dynamic patches cannot follow {message}"):
        sampled(changed)
    assert records == []


def test_a_model_has_the_patches_of_one_node():
    patcher = tiny_flux()
    trained = adapters(patcher)
    with pytest.raises(UnsupportedModelError, match="has dynamic patches already"):
        dynamic(dynamic(patcher, "2: 2", trained), "4: 2", trained)

"""RALU Sampler as called by ComfyUI: compared with KSampler, its outputs, and what it refuses."""

from __future__ import annotations

import pytest
import torch

SETTINGS = {"seed": 7, "cfg": 1.0, "preset": "FLUX 7x", "upsample_ratio": 0.34, "regions": "edges"}
SMALL = {"samples": torch.zeros(1, 4, 8, 12)}


@pytest.fixture
def ralu(nodes, model, vae, prompt, run_node):
    """Run the node; every call takes the inputs that differ from the defaults."""

    def run(**changes):
        ordinary = {"model": model, "positive": prompt, "latent_image": SMALL, "vae": vae, **SETTINGS}
        return run_node(nodes.RaluSampler, **{**ordinary, **changes}).args

    return run


def test_a_run_gives_a_latent_the_regions_and_a_report(ralu):
    latent, regions, report = ralu()
    assert latent["samples"].shape == (1, 4, 8, 12)
    assert bool(latent["samples"].isfinite().all())
    assert regions.shape == (1, 64, 96, 3)
    assert 0.0 <= regions.min() < regions.max() <= 1.0
    assert "FLUX 7x: 10 steps. Steps and image tokens of each stage: 2 x 6, 3 x 12, 5 x 24." in report
    assert "Noise levels of stage 1: 1.0000, 0.9417, 0.8000." in report
    assert "Noise levels of stage 3: 0.9359" in report


def test_one_stage_is_core_s_sampler_bit_for_bit(ralu, model, prompt):
    """SamplerCustom with euler and the same noise levels; `custom` with one stage gives the usual schedule."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    latent, _, report = ralu(preset="custom", custom_steps="4", custom_ends="1", cfg=3.0, negative=prompt)
    shifted = [3.0 * u / (1.0 + 2.0 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    with torch.inference_mode():
        expected, _ = SamplerCustom.execute(
            model,
            True,
            7,
            3.0,
            prompt,
            prompt,
            comfy.samplers.sampler_object("euler"),
            torch.FloatTensor(shifted),
            SMALL,
        ).args
    assert torch.equal(latent["samples"], expected["samples"])
    assert "Solved: h 3.000" in report


def test_the_same_seed_gives_the_same_picture_and_another_another(ralu):
    first, again, other = (ralu(seed=seed)[0]["samples"] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_preset_and_kind_of_region_runs(ralu, nodes):
    schema = {entry.id: entry for entry in nodes.RaluSampler.GET_SCHEMA().inputs}
    for preset in schema["preset"].options:
        assert ralu(preset=preset)[0]["samples"].isfinite().all()
    for regions in schema["regions"].options:
        assert ralu(regions=regions)[0]["samples"].isfinite().all()


def test_no_vae_is_needed_for_gradients_and_the_model_is_not_changed(ralu, model):
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    _, regions, _ = ralu(regions="latent gradient", vae=None)
    assert regions.shape == (1, 64, 96, 3)
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in model.model.state_dict().items())
    assert not model.wrappers


def test_guidance_reads_the_negative(ralu, tiny):
    runs = [ralu(cfg=3.0, negative=tiny.captions((5,), seed=seed)[0])[0]["samples"] for seed in (2, 3)]
    assert not torch.equal(*runs)
    unread = [ralu(negative=tiny.captions((5,), seed=seed)[0])[0]["samples"] for seed in (2, 3)]
    assert torch.equal(*unread)


def test_a_mask_forces_its_regions(ralu):
    mask = torch.zeros(1, 64, 96)
    mask[0, :, 64:] = 1.0
    _, regions, report = ralu(mask=mask, upsample_ratio=0.0)
    assert "3 x 12" in report
    assert (regions[0, ::32, 80, 0] > regions[0, ::32, 80, 2]).all()


def test_pictures_of_a_batch_differ_and_keep_what_a_latent_says(ralu):
    latent, regions, _ = ralu(latent_image={"samples": torch.zeros(2, 4, 8, 12), "batch_index": [3, 4]})
    assert not torch.equal(*latent["samples"])
    assert latent["batch_index"] == [3, 4]
    assert len(regions) == 2


def test_an_empty_latent_of_other_channels_and_scale_is_brought_to_the_model_s(ralu):
    given = {"samples": torch.zeros(1, 16, 4, 6), "downscale_ratio_spacial": 16}
    latent, _, _ = ralu(latent_image=given)
    assert latent["samples"].shape == (1, 4, 8, 12)
    assert set(latent) == {"samples"}


@pytest.fixture
def watched(monkeypatch):
    """The arguments of ComfyUI's callback for previews and progress; the bar itself shows only some of them."""
    import latent_preview

    seen, made = [], latent_preview.prepare_callback

    def prepare(model, steps, *rest):
        callback = made(model, steps, *rest)

        def told(step, clean, noisy, total):
            callback(step, clean, noisy, total)
            seen.append((step, total, tuple(clean.shape[-2:])))
            if told.stop_at == step:
                import comfy.model_management

                comfy.model_management.interrupt_current_processing()

        told.stop_at = stop_at[0]
        return told

    stop_at = [None]
    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    return seen, stop_at


def test_previews_and_progress_come_with_every_step(ralu, watched):
    seen, _ = watched
    ralu()
    assert seen == [(step, 10, (4, 6) if step < 2 else (8, 12)) for step in range(10)]


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_cancelled_run_stops_at_the_next_step(ralu, watched, step):
    import comfy.model_management

    seen, stop_at = watched
    stop_at[0] = step
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ralu()
    assert len(seen) == step + 1
    stop_at[0] = None
    assert ralu()[0]["samples"].isfinite().all()


class Nested:
    is_nested = True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": 3.0}, "cfg is 3.0, but no negative came in"),
        ({"vae": None}, "found in the decoded picture, and no VAE came in"),
        ({"preset": "FLUX 9x"}, "preset must be one of FLUX 4x, .* or custom, got 'FLUX 9x'"),
        ({"regions": "corners"}, "regions must be one of edges, .*, got 'corners'"),
        ({"upsample_ratio": 1.5}, "share of early regions must be between 0 and 1, got 1.5"),
        (
            {"preset": "custom", "custom_steps": "5, x"},
            "custom_steps must be numbers separated by commas, got '5, x'",
        ),
        ({"preset": "custom", "custom_ends": ""}, "custom_ends must be numbers separated by commas, got ''"),
        ({"preset": "custom", "custom_steps": "5, 6"}, "same number of steps and of end times, .* got 2 and 3"),
        ({"preset": "custom", "custom_ends": "0.5, 0.4, 1"}, "End times must rise"),
        ({"preset": "custom", "custom_steps": "0, 1, 1"}, "Every stage needs at least one step"),
        ({"preset": "custom", "custom_shift": 0.0}, "shift must be between 0.1 and 100"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 8, 10)}}, "multiples of 32 px, .* got 80 x 64"),
        ({"latent_image": {**SMALL, "noise_mask": torch.ones(1, 64, 96)}}, "got a latent with a noise mask"),
        ({"latent_image": {"samples": Nested()}}, "got several latents in one"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_used_is_refused(ralu, changes, message):
    with pytest.raises(ValueError, match=message):
        ralu(**changes)


def test_a_model_of_no_known_family_is_refused(ralu, tiny):
    patcher = tiny.tiny_flux()
    patcher.model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"token positions can be set \(FLUX\.1, .*, Krea 2, .*\), got Linear"):
        ralu(model=patcher)


def test_a_controlnet_is_refused(ralu, prompt):
    controlled = [[prompt[0][0], {**prompt[0][1], "control": object()}]]
    with pytest.raises(ValueError, match="takes text conditionings only, got a ControlNet"):
        ralu(positive=controlled)

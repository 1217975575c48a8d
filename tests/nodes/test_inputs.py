"""Wrong inputs from a link of a wildcard type, or from a loader that found nothing, are refused by the input's name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def residuals(bench):
    """Residuals that need no file."""
    return bench.precompute(storage="on the fly")[0]


def listed(bench, *values):
    return type(bench.pictures)(values)


@pytest.mark.parametrize("stranger", [None, "x", SimpleNamespace(model=None), torch.zeros(1)], ids=repr)
def test_what_is_no_model_is_refused_by_every_node(bench, residuals, nodes, run_node, stranger):
    selection = bench.select()[0]
    for start in (
        lambda: bench.select(model=stranger),
        lambda: bench.precompute(model=stranger, selection=selection),
        lambda: bench.train(model=stranger, residuals=residuals),
        lambda: bench.apply(model=stranger),
        lambda: run_node(nodes.MemoryPlan, model=stranger, positive=bench.prompt, selection=selection),
    ):
        with pytest.raises(ValueError, match=r"`model` must be a MODEL, from Load Diffusion Model, got a "):
            start()


@pytest.mark.parametrize("stranger", [None, {}, 1.5], ids=repr)
def test_what_does_not_belong_on_a_socket_is_refused(bench, residuals, stranger):
    lora = {} if stranger == {} else stranger
    refused = [
        (r"`vae` must be a VAE, from Load VAE, got a ", lambda: bench.precompute(vae=stranger)),
        (r"`selection` must be a selection, from Select Blocks", lambda: bench.precompute(selection=stranger)),
        (r"`residuals` must be residuals, from Precompute Residuals", lambda: bench.train(residuals=stranger)),
    ]
    if lora:
        refused += [
            (r"`lora` must be a LoRA, from Dynamic Patch Trainer", lambda: bench.apply(lora=lora)),
            (r"`start_from` must be a LoRA", lambda: bench.train(residuals=residuals, start_from=lora)),
            (r"`clip_vision` must be a CLIP_VISION", lambda: bench.select(vae=bench.vae, clip_vision=lora)),
        ]
    for match, start in refused:
        with pytest.raises(ValueError, match=match):
            start()


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"steps": "3"}, "`steps` must be a whole number, got a str"),
        ({"steps": 3.0}, "`steps` must be a whole number, got a float"),
        ({"rank": None}, "`rank` must be a whole number, got a NoneType"),
        ({"rank": 1025}, "`rank` must be at most 1024, got 1025"),
        ({"steps": 10**30}, "`steps` must be at most 1000000, got 1"),
        ({"learning_rate": (1,)}, "`learning_rate` must be a number, got a tuple"),
        ({"learning_rate": 10**400}, "`learning_rate` must be at most 1, got a number"),
        ({"resume": "yes"}, "`resume` must be true or false, got a str"),
        ({"output_name": 7}, "`output_name` must be a text, got a int"),
        ({"targets": b"mlp"}, "`targets` must be a text, got a bytes"),
        ({"seed": -1}, r"seed must be between 0 and 2\*\*64 - 1, got -1"),
        ({"alpha": float("inf")}, "alpha must be positive, got inf"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
    ],
    ids=str,
)  # fmt: skip
def test_a_widget_takes_nothing_but_its_type(bench, residuals, setting, match):
    with pytest.raises(ValueError, match=match):
        bench.train(residuals=residuals, **setting)


def test_numbers_of_other_libraries_are_numbers(bench, residuals):
    import numpy as np

    trained = bench.train(residuals=residuals, steps=np.int64(2), learning_rate=np.float64(1e-3), rank=np.int16(2))
    assert trained[2] == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_where_they_come_in(bench, value):
    with pytest.raises(ValueError, match="timestep shift must be positive, got"):
        bench.precompute(timesteps="shifted", timestep_shift=value)
    with pytest.raises(ValueError, match="cfg must be at least 1, got"):
        bench.select(method="attention mask", probe_cfg=value)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (None, "Conditioning 1 holds no text. Connect CLIP Text Encode"),
        ([None, {}], "Conditioning 1 holds no text"),
        ([torch.zeros(1, 5, 16)], "Conditioning 1 holds no text"),
        ([torch.zeros(1, 5, 16), None], "Conditioning 1 holds no text"),
        ([torch.zeros(5, 16), {}], r"must be one text of shape \(1, tokens, width\), got \(5, 16\)"),
        ([torch.zeros(2, 5, 16), {}], r"got \(2, 5, 16\) of torch.float32. Connect each text as a separate conditioning"),
        ([torch.zeros(1, 0, 16), {}], r"got \(1, 0, 16\)"),
        ([torch.zeros(1, 5, 16, dtype=torch.int64), {}], r"of torch.int64"),
        ([torch.zeros(1, 5, 16), {"pooled_output": torch.zeros(16)}], r"pooled output .* shape \(1, width\), got \(16,\)"),
        ([torch.zeros(1, 5, 16), {"pooled_output": "x"}], r"pooled output .* got str"),
        ([torch.zeros(1, 5, 15), {}], "Conditioning 1 has width 15, FLUX.1 needs 16. Encode the text with the text"),
        ([torch.zeros(1, 5, 16), {"pooled_output": torch.zeros(1, 15)}], "has width 15, FLUX.1 needs 16"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_text_for_this_model_is_refused(bench, entry, match):
    settings = {"method": "attention mask", "probe_size": 32, "probe_steps": 1}
    for start in (lambda: bench.precompute(positive=[entry]), lambda: bench.select(positive=[entry], **settings)):
        with pytest.raises(ValueError, match=match):
            start()


def test_guidance_of_the_probe_needs_a_negative(bench):
    """Without one, the prompt would be its own negative, and guidance would cancel."""
    with pytest.raises(ValueError, match="`probe_cfg` is 2 and needs a `negative`"):
        bench.select(method="attention mask", probe_cfg=2.0, probe_size=32, probe_steps=1)


def test_texts_of_another_encoder_are_refused_as_negative_too(bench):
    settings = {"method": "attention mask", "probe_size": 32, "probe_steps": 1, "probe_cfg": 2.0}
    with pytest.raises(ValueError, match="Conditioning 2 has width 15"):
        bench.select(negative=[[torch.zeros(1, 5, 15), {}]], **settings)


@pytest.mark.parametrize("picture", [None, "x", torch.zeros(()), torch.zeros(3), torch.zeros(1, 0, 64, 3), torch.zeros(1, 64, 64, 0)], ids=str)  # fmt: skip
def test_what_is_no_picture_is_refused(bench, picture):
    with pytest.raises(ValueError, match="^Picture 1 (is not a picture but a|must come in the shape)"):
        bench.precompute(images=listed(bench, picture))


def changed(lora, name, tensor):
    return {key: tensor if key.endswith(name) else value for key, value in lora.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda lora: {key: value for key, value in lora.items() if not key.endswith("lora_down.weight")},
        lambda lora: changed(lora, ".alpha", torch.zeros(3)),
        lambda lora: changed(lora, "lora_up.weight", torch.zeros(64)),
        lambda lora: changed(lora, "lora_down.weight", torch.zeros(0)),
        lambda lora: changed(lora, "lora_down.weight", torch.zeros(7, 64)),
        lambda lora: dict.fromkeys(lora, 1.5),
    ],
)
def test_a_lora_that_is_none_is_refused(bench, residuals, damage):
    lora = damage(dict(bench.train(residuals=residuals)[0]))
    for start in (lambda: bench.apply(lora=lora), lambda: bench.train(residuals=residuals, start_from=lora)):
        with pytest.raises(ValueError, match="cannot read this as a LoRA|This LoRA is damaged|This LoRA does not fit"):
            start()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": None}, "`model` must be a MODEL"),
        ({"vae": "x"}, "`vae` must be a VAE"),
        ({"mask": "x"}, "`mask` must be a MASK, got a str"),
        ({"latent_image": {}}, "`latent_image` must be a LATENT, from Empty Latent Image, got a dict"),
        ({"custom_steps": 5.0}, "`custom_steps` must be a text, got a float"),
    ],
    ids=str,
)
def test_the_sampler_refuses_what_does_not_belong_to_it(bench, nodes, run_node, change, match):
    ordinary = {"model": bench.model, "positive": bench.prompt, "latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}
    settings = {"seed": 0, "cfg": 1.0, "preset": "custom", "upsample_ratio": 0.2, "regions": "latent gradient"}
    with pytest.raises(ValueError, match=match):
        run_node(nodes.RaluSampler, **{**ordinary, **settings, **change})

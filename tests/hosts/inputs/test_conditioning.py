"""ComfyUI's CONDITIONINGs as inputs, and crops on their way through the VAE."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from blockskip_pack.blockskip_core.data.crops import TrainingCrops
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig, crop_and_resize
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.residuals.precompute import precompute_residuals

from ...core.plain_dit import schedule
from ..hosted_runs import LATENT_SHAPE
from ..tiny_families import FAMILIES, PLAN, replayed
from ..tiny_flux import captions, tiny_flux

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def conditioning(comfyui):
    from blockskip_pack.blockskip_core.hosts.inputs import conditioning

    return conditioning


@pytest.fixture
def encoding(comfyui):
    from blockskip_pack.blockskip_core.hosts.inputs import encoding

    return encoding


def test_entries_are_flattened_in_order(conditioning):
    a, b, c = (entry[0] for entry in captions((5, 3, 4)))
    assert conditioning.flatten_conditionings([[a], [b], [c]]) == [[a], [b], [c]]


def test_texts_that_are_combined_are_no_caption(conditioning):
    a, b, c = (entry[0] for entry in captions((5, 3, 4)))
    with pytest.raises(InvalidInputError, match="Conditioning 2 combines 2 texts, and training takes one"):
        conditioning.flatten_conditionings([[a], [b, c]])


@pytest.mark.parametrize("nothing", [[], [[]]])
def test_nothing_is_refused(conditioning, nothing):
    with pytest.raises(InvalidInputError, match="No conditioning came in"):
        conditioning.flatten_conditionings(nothing)


@pytest.mark.parametrize(
    ("name", "value"),
    [("area", (8, 8, 0, 0)), ("mask", torch.ones(1, 8, 8)), ("control", object()), ("gligen", ()), ("hooks", object()),
     ("start_percent", 0.2), ("end_percent", 0.8), ("reference_latents", [torch.ones(1)]), ("strength", 0.2),
     ("strength", torch.ones(2)), ("concat_latent_image", torch.ones(1, 4, 4, 4)), ("clip_vision_output", object()),
     ("default", True)],
)  # fmt: skip
def test_settings_that_training_cannot_follow_are_refused_by_name(conditioning, name, value):
    made = captions((5, 3))
    made[1][0][1][name] = value
    with pytest.raises(InvalidInputError, match=f"Conditioning 2 carries {name}, which training cannot follow"):
        conditioning.flatten_conditionings(made)
    made[1][0][1][name] = None
    assert len(conditioning.flatten_conditionings(made)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"minimax_keyframes": [{"resolved_frame_index": 0}]}, "Conditioning 2 carries keyframes. They belong to a whole picture"),
     ({"minimax_refs": [{"kind": "image"}]}, "Conditioning 2 carries minimax_refs, which training cannot follow"),
     ({"minimax_refs": torch.ones(2)}, "Conditioning 2 carries minimax_refs, which training cannot follow"),
     ({"minimax_keyframes": torch.ones(2)}, "Conditioning 2 carries keyframes"),
     ({"minimax_refs": [{"kind": "image", "latent": 0}, {"kind": "audio", "latent": 0}]}, "reference clips or sounds, and training takes reference")],
)  # fmt: skip
def test_what_minimax_sees_besides_text_and_reference_pictures_is_refused(conditioning, settings, message):
    made = captions((5, 3))
    made[1][0][1].update(settings)
    with pytest.raises(InvalidInputError, match=message):
        conditioning.flatten_conditionings(made, with_references=True)


def test_reference_pictures_of_minimax_are_among_the_reference_latents(conditioning):
    made, latent = captions((5,)), torch.ones(1, 24, 1, 4, 4)
    before = dict(made[0][0][1], minimax_refs=[{"kind": "image", "latent_h": 4, "latent_w": 4, "latent": latent}])
    made[0][0][1].update(before)
    [[[_, settings]]] = conditioning.flatten_conditionings(made, with_references=True)
    assert settings["reference_latents"] == [latent]
    assert "minimax_refs" not in settings
    assert made[0][0][1] == before
    with pytest.raises(InvalidInputError, match="carries reference_latents, which training cannot follow"):
        conditioning.flatten_conditionings(made)


def test_settings_that_say_nothing_are_taken(conditioning):
    made = captions((5,))
    made[0][0][1].update(strength=1.0, start_percent=0.0, end_percent=1.0)
    assert len(conditioning.flatten_conditionings(made)) == 1


@pytest.mark.parametrize("setting", ["strength", "start_percent", "end_percent"])
def test_every_value_but_the_neutral_one_is_refused(conditioning, setting):
    made = captions((5,))
    made[0][0][1][setting] = 0.5
    with pytest.raises(InvalidInputError, match=f"carries {setting}, which"):
        conditioning.flatten_conditionings(made)


def test_equal_texts_have_equal_keys(conditioning):
    first, other = captions((5, 5))
    again = [[first[0][0].clone(), dict(first[0][1])]]
    keys = conditioning.same_texts([first, other, again])
    assert keys[0] == keys[2] != keys[1]
    again[0][1]["pooled_output"] = again[0][1]["pooled_output"] + 1
    assert conditioning.same_texts([again]) != [keys[0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embedding", "pooled"])
def test_numbers_that_are_not_finite_are_refused(conditioning, where, value):
    made = captions((5, 3))
    embedding, settings = made[1][0]
    (embedding if where == "embedding" else settings["pooled_output"])[0, 0] = value
    with pytest.raises(InvalidInputError, match="Conditioning 2 contains NaN or Inf"):
        conditioning.flatten_conditionings(made)


def test_the_model_is_given_text_pooled_vector_and_guidance(conditioning):
    entry = captions((5,), guidance=2.5)[0]
    model = tiny_flux(guidance=True).model
    given = conditioning.model_arguments(model, entry, torch.zeros(1, *LATENT_SHAPE), torch.device("cpu"))
    assert torch.equal(given["c_crossattn"], entry[0][0])
    assert torch.equal(given["y"], entry[0][1]["pooled_output"])
    assert given["guidance"].tolist() == [2.5]
    with torch.inference_mode():
        entry = captions((5,))[0]
    given = conditioning.model_arguments(model, entry, torch.zeros(1, *LATENT_SHAPE), torch.device("cpu"))
    assert given["guidance"].tolist() == [3.5]  # ComfyUI's default
    assert not any(value.is_inference() for value in given.values() if isinstance(value, torch.Tensor))


def test_rows_are_joined_along_the_batch(conditioning):
    rows = [{"a": torch.full((1, 2), float(i)), "b": "same", "c": None} for i in range(3)]
    joined = conditioning.join_arguments(rows)
    assert joined["a"][:, 0].tolist() == [0.0, 1.0, 2.0]
    assert (joined["b"], joined["c"]) == ("same", None)


def test_lists_of_tensors_are_joined_entry_by_entry(conditioning):
    rows = [{"refs": [torch.full((1, 2), float(i)), torch.full((1, 3), 10.0 + i)]} for i in range(2)]
    first, second = conditioning.join_arguments(rows)["refs"]
    assert (first[:, 0].tolist(), second[:, 0].tolist()) == ([0.0, 1.0], [10.0, 11.0])
    assert conditioning.join_arguments([{"sizes": [1, 2]}, {"sizes": [3, 4]}]) == {"sizes": [1, 2]}  # as ever


def test_references_are_taken_only_where_they_are_expected(conditioning):
    [[[text, settings]]] = captions((5,))
    given = [[[text, {**settings, "reference_latents": [torch.zeros(1, 4, 3, 5)]}]]]
    with pytest.raises(
        InvalidInputError, match="Conditioning 1 carries reference_latents, which training cannot follow"
    ):
        conditioning.flatten_conditionings(given)
    [flat] = conditioning.flatten_conditionings(given, with_references=True)
    assert len(conditioning.references_of(flat)) == 1
    assert conditioning.without_references(flat)[0][1] == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_latents": torch.zeros(1, 4, 3, 5)}, "not single pictures"),
        ({"reference_latents": [torch.zeros(2, 4, 3, 5)]}, "not single pictures"),
        ({"reference_latents": [torch.zeros(1, 4, 0, 5)]}, "not single pictures"),
        ({"reference_latents": [torch.zeros(1, 4, 3)]}, "not single pictures"),
        ({"reference_latents": [torch.full((1, 4, 3, 5), float("nan"))]}, "reference latents with NaN or Inf"),
        ({"reference_latents_method": 3}, "carries a int as the method of its reference latents"),
    ],
)  # fmt: skip
def test_references_of_another_form_are_refused(conditioning, settings, message):
    [[[text, own]]] = captions((5,))
    with pytest.raises(InvalidInputError, match=message):
        conditioning.flatten_conditionings([[[text, {**own, **settings}]]], with_references=True)


def test_captions_that_differ_in_their_references_share_all_else(conditioning):
    [[[text, own]]] = captions((5,))
    rows = [[[text, {**own, "reference_latents": [torch.full((1, 4, 3, 5), float(i))]}]] for i in range(3)]
    model = tiny_flux().model

    def convert(caption):
        return conditioning.model_arguments(model, caption, torch.zeros(1, *LATENT_SHAPE), torch.device("cpu"))

    shared = conditioning.arguments_for_each(convert, [*rows, captions((5,), seed=2)[0]], "ref_latents")
    for made, row in zip(shared, rows, strict=False):
        alone = convert(row)
        assert made.keys() == alone.keys()
        assert torch.equal(made["c_crossattn"], alone["c_crossattn"])
        assert torch.equal(made["ref_latents"][0], alone["ref_latents"][0])
    assert len({id(made["c_crossattn"]) for made in shared}) == 2
    assert "ref_latents" not in shared[3]


def test_captions_with_a_mask_over_padding_are_run_as_the_host_runs_them(comfyui):
    """Some text encoders give Qwen-Image a mask."""
    tiny = next(family for family in FAMILIES if family.name == "qwen_image")
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    patcher, clean, spans = tiny.build(), tiny.clean_latents(), tiny.chosen(1, 2)
    dit = tiny.hosted(patcher, (5, 5, 5), attention_mask=mask)
    residuals = precompute_residuals(dit, PLAN, clean, spans, [0]).residuals
    found = replayed(dit, spans, residuals, clean, [0])
    masked = replace(tiny, extra=lambda text, rows: {"c_crossattn": text, "attention_mask": mask})
    torch.testing.assert_close(found, masked.full_forward(dit, clean, [0]), atol=1e-5, rtol=0.0)
    assert not torch.allclose(found, tiny.full_forward(dit, clean, [0]), atol=1e-4)


def test_rows_with_different_settings_are_not_one_batch(conditioning):
    with pytest.raises(InvalidInputError, match="different settings"):
        conditioning.join_arguments([{"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2), "mask": torch.ones(1, 2)}])


class Vae:
    """Averages 8 x 8 px; repeats the first colour, so that there are four channels."""

    def encode(self, pixels):
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat((cells, cells[:, :1]), dim=1)

    def spacial_compression_encode(self):
        return 8


def test_crops_are_encoded_in_the_models_scale_once(encoding):
    model, seen = tiny_flux().model, []
    crops = [torch.rand(16, 16, 3) for _ in range(3)]
    latents = encoding.encode_crops(Vae(), model, crops, lambda *count: seen.append(count))
    assert latents.shape == (3, 4, 2, 2)
    expected = (Vae().encode(torch.stack(crops)) - 0.25) * 0.5
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0.0)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert encoding.crop_multiple(Vae(), 2) == 16


def test_equal_crops_are_encoded_once(encoding):
    model, vae, seen = tiny_flux().model, Vae(), []
    one, other = torch.rand(2, 16, 16, 3)
    crops = [one, other, one, other, one]
    plain = encoding.encode_crops(vae, model, crops)
    latents = encoding.encode_crops(
        vae, model, crops, lambda *count: seen.append(count), order=[1, 3, 0, 2, 4], alike=[0, 1, 0, 1, 0]
    )
    assert torch.equal(latents, plain)
    assert seen == [(1, 2), (2, 2)]


def test_a_vae_that_does_not_fit_is_refused(encoding):
    latents = SimpleNamespace(latent_channels=16, latent_dimensions=2)
    model = SimpleNamespace(process_latent_in=lambda x: x, latent_format=latents)
    with pytest.raises(InvalidInputError, match="latents of 16 channels, this VAE makes 4"):
        encoding.encode_crops(Vae(), model, [torch.rand(16, 16, 3)])
    latents.latent_channels = 4
    model = SimpleNamespace(process_latent_in=lambda x: x * float("nan"), latent_format=latents)
    with pytest.raises(InvalidInputError, match="NaN or Inf"):
        encoding.encode_crops(Vae(), model, [torch.rand(16, 16, 3)])


def test_training_crops_are_cut_where_the_schedule_says(encoding):
    plan = schedule((0.3, 0.6), (0, 0))
    pictures = [torch.rand(24, 30, 3)]
    object.__setattr__(plan.draws[1], "top", 5)
    object.__setattr__(plan.draws[1], "left", 7)
    assert plan.patches == PatchConfig(patch_min=16, patch_max=32)
    for crop, draw in zip(TrainingCrops(pictures, plan), plan, strict=True):
        expected = crop_and_resize(pictures[0], top=draw.top, left=draw.left, crop=(16, 16), size=(16, 16))
        assert torch.equal(crop, expected)
    assert torch.equal(TrainingCrops(pictures, plan)[1], pictures[0][5:21, 7:23])

"""Reference pictures of edit models, from a folder or a link to the trained LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError, UnsupportedModelError
from PIL import Image

from ..hosts.tiny_families import FAMILIES
from ..hosts.tiny_minimax import MINIMAX
from .conftest import PATCHES, TRAINING, Listed
from .test_families import FamilyVae

WHOLE = {"patch_min": 32, "patch_max": 48, "reference_size": 48}
PLAN = {
    "patch_min": 32, "draws": 6, "storage": "disk", "rank": 4, "batch_size": 1, "checkpointing": True,
    "quantize_kept": "off", "activation_budget": 0.0, "card_memory": 0.0, "back_residual": "constant",
}  # fmt: skip


@pytest.fixture
def before(pictures):
    """A reference of every picture, of half its size."""
    return Listed(
        torch.rand(1, x.shape[1] // 2, x.shape[2] // 2, 3, generator=torch.Generator().manual_seed(i))
        for i, x in enumerate(pictures)
    )


def references_of(caption):
    return caption[0][1].get("reference_latents", [])


def test_whole_references_are_encoded_once_and_belong_to_their_pictures(bench, before):
    residuals, _ = bench.precompute(references=before, **WHOLE).args
    assert len(residuals.captions) == 3
    assert all(draw.caption == draw.picture for draw in residuals.schedule)
    shapes = [tuple(references_of(caption)[0].shape) for caption in residuals.captions]
    assert shapes == [(1, 4, 4, 4), (1, 4, 4, 6), (1, 4, 4, 8)]  # 32 x 32, 35 x 48 and 24 x 65 px, in 16 px steps
    expected = bench.vae.encode(torch.nn.functional.interpolate(
        before[1].movedim(-1, 1), (32, 48), mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1))  # fmt: skip
    assert torch.equal(references_of(residuals.captions[1])[0], expected)
    crops = {(draw.picture, draw.side, draw.top, draw.left) for draw in residuals.schedule}
    assert bench.vae.encoded == 3 + 1 + len(crops)


def test_the_same_part_is_shown_of_picture_and_reference(bench, pictures):
    """A picture as its own reference: the latents of the crops are those of the references."""
    residuals, _ = bench.precompute(references=pictures, reference_part="same part", **WHOLE).args
    model = bench.model.model
    assert [draw.caption for draw in residuals.schedule] == list(range(6))
    for index, caption in enumerate(residuals.captions):
        [latent] = references_of(caption)
        torch.testing.assert_close(model.process_latent_in(latent)[0], residuals.latents[index])
    assert len({id(caption[0][0]) for caption in residuals.captions}) == 1
    given = hosted(bench, residuals).arguments
    assert len({id(arguments["c_crossattn"]) for arguments in given}) == 1
    for arguments, latent in zip(given, residuals.latents, strict=True):
        torch.testing.assert_close(arguments["ref_latents"][0][0], latent)


def hosted(bench, residuals):
    from blockskip_pack.blockskip_core.hosts.models.hosted_dit import HostedDit

    return HostedDit(bench.model, residuals.captions, residuals.latents.shape[1:])


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
@pytest.mark.parametrize("part", ["whole", "same part"])
def test_training_with_references_starts_as_the_whole_model(bench, before, pictures, storage, part):
    residuals, _ = bench.precompute(
        references=before if part == "whole" else pictures, reference_part=part, storage=storage, **WHOLE
    ).args
    trained = bench.train(residuals=residuals, batch_size=2)
    assert storage == "on the fly" or trained.ui["blockskip"][0]["self_check"] < 1e-5
    assert len(trained[1]["loss"]) == TRAINING["steps"]


def test_minimax_h3_is_trained_with_references(nodes, run_node, pictures, folders, before):
    model, positive = MINIMAX.build(), MINIMAX.captions((5,))[0]
    skipped = {"method": "manual", "skip_ratio": 0.5, "front": 1, "back": 1}
    selection, *_ = run_node(nodes.SelectBlocks, model=model, positive=positive, **skipped).args
    settings = {**PATCHES, **WHOLE, "patch_max": 32, "draws": 3}
    residuals, _ = run_node(
        nodes.PrecomputeResiduals, model=model, vae=FamilyVae(model.model, frames=True), images=pictures, positive=positive,
        selection=selection, references=before, **settings,
    ).args  # fmt: skip
    shapes = [tuple(references_of(caption)[0].shape) for caption in residuals.captions]
    assert shapes == [(1, 24, 1, 2, 2), (1, 24, 1, 2, 4), (1, 24, 1, 2, 4)]  # the model wants even sides
    trained = run_node(nodes.TrainLora, model=model, residuals=residuals, **TRAINING)
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5
    assert len(trained[1]["loss"]) == TRAINING["steps"]


def test_a_run_with_references_is_resumed_and_one_with_others_is_not(bench, before):
    residuals, _ = bench.precompute(references=before, **WHOLE).args
    whole = bench.train(residuals=residuals, steps=4, resume=True)
    first = bench.train(residuals=residuals, steps=2, resume=True, seed=6)
    assert first.ui["blockskip"][0]["resumed_at"] == 0
    more = bench.train(residuals=residuals, steps=4, resume=True, seed=6)
    assert more.ui["blockskip"][0]["resumed_at"] == 2
    assert len(more[1]["loss"]) == len(whole[1]["loss"]) == 4
    others, _ = bench.precompute(references=Listed(x * 0.5 for x in before), **WHOLE).args
    assert bench.train(residuals=others, steps=4, resume=True, seed=6).ui["blockskip"][0]["resumed_at"] == 0


def test_references_change_the_cache_and_nothing_else_does(bench, before):
    keys = [
        bench.precompute(**{**WHOLE, **changes})[0].identity.key
        for changes in (
            {}, {"reference_part": "same part"}, {"references": before}, {"references": before},
            {"references": Listed([before[0] + 0.0, before[1], before[2] * 0.5])}, {"references": before, "reference_size": 16},
        )
    ]  # fmt: skip
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 4


def test_one_reference_may_be_for_all_and_a_picture_may_have_several(bench, before):
    one, _ = bench.precompute(references=Listed(before[:1]), **WHOLE).args
    assert len(one.captions) == len(references_of(one.captions[0])) == 1
    several, _ = bench.precompute(references=Listed([*before, *before]), **WHOLE).args
    counts = [[tuple(latent.shape[-2:]) for latent in references_of(caption)] for caption in several.captions]
    assert counts == [[(4, 4), (4, 6)], [(4, 8), (4, 4)], [(4, 6), (4, 8)]]


def test_references_of_host_nodes_are_used_as_they_are(bench, before):
    """ReferenceLatent after CLIP Text Encode, for every picture."""
    import node_helpers

    captions = [
        node_helpers.conditioning_set_values(bench.prompt, {"reference_latents": [bench.vae.encode(x)]}, append=True)
        for x in before
    ]
    residuals, _ = bench.precompute(positive=Listed(captions), **WHOLE).args
    assert [tuple(references_of(caption)[0].shape[-2:]) for caption in residuals.captions] == [(4, 4), (4, 6), (3, 8)]
    assert bench.train(residuals=residuals).ui["blockskip"][0]["self_check"] < 1e-5
    with pytest.raises(InvalidInputError, match="carry reference latents already"):
        bench.precompute(positive=Listed(captions), references=before, **WHOLE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda before: {"references": Listed(before[:2])}, "equally many for each of the 3 pictures, got 2"),
        (lambda before: {"references": Listed()}, "No references came in"),
        (lambda before: {"references": Listed([before[0] * 9, *before[1:]])}, "Reference 1 of 3 has values"),
        (lambda before: {"references": Listed([before[1], *before[1:]]), "reference_part": "same part"},
         r"Reference 1 of 3 has 48 x 35 px and its picture 64 x 64 px"),
        (lambda before: {"references": before, "reference_size": 8}, "reference_size must be at least 16"),
        (lambda before: {"references": before, "reference_part": "half"}, "reference_part must be one of whole, same part"),
        (lambda before: {"references": before, "frames": 5}, "References are for pictures. Set `frames` to 1"),
    ],
)  # fmt: skip
def test_references_that_do_not_fit_are_refused(bench, before, changes, message):
    images = {"images": torch.rand(5, 64, 64, 3)} if "frames" in changes(before) else {}
    with pytest.raises(InvalidInputError, match=message):
        bench.precompute(**{**WHOLE, **changes(before), **images})


def test_a_family_that_looks_at_no_references_refuses_them(bench, before, nodes, run_node, pictures):
    tiny = next(one for one in FAMILIES if one.name == "chroma")
    model = tiny.build()
    selection = run_node(
        nodes.SelectBlocks,
        model=model,
        positive=tiny.captions((5,))[0],
        method="manual",
        skip_ratio=0.5,
        front=1,
        back=1,
    )[0]
    with pytest.raises(UnsupportedModelError, match="Reference pictures are not supported for Chroma models"):
        bench.precompute(
            model=model, vae=FamilyVae(model.model, tiny.frames), positive=tiny.captions((5,))[0],
            selection=selection, references=before, **WHOLE,
        )  # fmt: skip


def test_a_reference_of_another_vae_is_refused(bench):
    import node_helpers

    wrong = node_helpers.conditioning_set_values(bench.prompt, {"reference_latents": [torch.zeros(1, 16, 4, 4)]})
    with pytest.raises(
        InvalidInputError, match=r"reads reference latents of 4 channels and 4 axes, got the shape \(1, 16"
    ):
        bench.precompute(positive=wrong, **WHOLE)


@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_other_edit_models_train_with_references(nodes, run_node, bench, pictures, before, name):
    tiny = next(one for one in FAMILIES if one.name == name)
    model, prompt = tiny.build(), tiny.captions((5,))[0]
    selection = run_node(
        nodes.SelectBlocks, model=model, positive=prompt, method="manual", skip_ratio=0.5, front=1, back=1
    )[0]
    residuals, _ = bench.precompute(
        model=model, vae=FamilyVae(model.model, tiny.frames), positive=prompt, selection=selection,
        references=before, **WHOLE,
    ).args  # fmt: skip
    trained = run_node(nodes.TrainLora, model=model, residuals=residuals, **TRAINING)
    assert trained.ui["blockskip"][0]["self_check"] < 1e-5


def test_the_plan_of_a_run_with_references_is_that_of_the_run(bench, nodes, before):
    from blockskip_pack.blockskip_core.residuals.residual_set import residual_bytes

    selection = bench.select()[0]
    largest = Listed([before[2]])  # one for all, so that every example is like the counted one
    residuals, _ = bench.precompute(references=largest, selection=selection, **WHOLE).args
    request = nodes.memory_plan.PlanRequest(**PLAN, reference_size=48)
    planned = nodes.memory_plan.Plan(
        bench.model, [bench.prompt], selection, request, lambda *_: None, [before[0], before[2]]
    )
    plain = nodes.memory_plan.Plan(bench.model, [bench.prompt], selection, request, lambda *_: None)
    assert planned.needs.disk == residual_bytes(hosted(bench, residuals), residuals, range(6)) > plain.needs.disk
    assert planned.needs.training.peak > plain.needs.training.peak
    files = sum(path.stat().st_size for path in bench.folders.output.glob("blockskip/residuals/*/*.safetensors"))
    assert planned.needs.disk < files < 1.3 * planned.needs.disk + 60_000  # with latents and headers


def test_pictures_that_were_not_edited_are_noticed_and_equal_instructions_are_not(bench, before, pictures):
    odd = Listed([before[0], pictures[1], before[2]])
    captions = Listed([bench.prompt] * 3)
    remarks = bench.precompute(positive=captions, references=odd, storage="on the fly", **WHOLE)[0].remarks
    assert [sentence for sentence in remarks if "the same" in sentence] == [
        "1 of 3 pictures is the same as before the edit: number 2. Is `references` connected to the pictures before the edit?"
    ]
    remarks = bench.precompute(positive=captions, storage="on the fly", **WHOLE)[0].remarks
    assert "All 3 captions are the same" in "".join(remarks)


# --- the folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def load(nodes, run_node, comfyui, tmp_path, monkeypatch):
    """Write pictures below the input folder, and load the folder "after"."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))

    def run(*names, **settings):
        for seed, name in enumerate(names):
            path = tmp_path / "input" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.full((8, 8, 3), seed, dtype=np.uint8)
            values[:, 0] = 200
            Image.fromarray(values).save(path)
        return run_node(nodes.LoadTrainingFolder, **{"folder": "after", "reference_folder": "before", **settings}).args

    return run


def shades(images):
    return [round(image[0, 4, 4, 0].item() * 255) for image in images]


def test_references_are_found_by_the_names_of_the_pictures(load):
    images, _, files, references = load("after/cat.png", "after/dog.jpeg", "before/DOG.webp", "before/cat.png")
    assert [file.name for file in files] == ["cat.png", "dog.jpeg"]
    assert shades(images)[0] == 0
    assert shades(references)[0] == 3
    assert len(references) == 2


def test_a_picture_may_have_numbered_references(load):
    _, _, _, references = load(
        "after/toy.png", "after/toy_1.png", "before/toy.png", "before/toy_2.png", "before/toy_10.png", "before/toy_1.png",
        "before/toy_1_1.png", "before/toy_1_2.png",
    )  # fmt: skip
    assert shades(references) == [2, 3, 4, 5, 6, 7]


def test_the_references_may_be_in_the_folder_of_the_pictures(load):
    images, _, _, references = load("after/a.png", "after/before/a.png", reference_folder="after/before")
    assert (shades(images), shades(references)) == ([0], [1])


def test_the_pictures_may_be_in_the_folder_of_the_references(load):
    """The pictures themselves are not taken for references."""
    names = ("set/a.png", "set/b.png", "set/after/a.png", "set/after/b.png", "set/more/a_1.png", "set/more/b_1.png")
    images, _, _, references = load(*names, folder="set/after", reference_folder="set")
    assert (shades(images), shades(references)) == ([2, 3], [0, 4, 1, 5])


def test_pictures_of_one_name_in_several_folders_have_the_references_of_their_own_folder(load):
    names = ("10_cats/01.png", "10_dogs/01.png")
    _, _, _, references = load(*(f"after/{name}" for name in names), *(f"before/{name}" for name in names))
    assert shades(references) == [2] * 10 + [3] * 10


def test_the_folders_of_references_may_have_other_numbers_of_repeats(load):
    _, _, _, references = load("after/1_cats/01.png", "after/2_dogs/01.png", "before/dogs/01.png", "before/cats/01.png")
    assert shades(references) == [3, 2, 2]


def test_folders_that_differ_by_their_repeats_alone_are_told_apart(load):
    names = ("1_cats/01.png", "2_cats/01.png")
    _, _, _, references = load(*(f"after/{name}" for name in names), *(f"before/{name}" for name in names))
    assert shades(references) == [2, 3, 3]


def test_a_reference_in_no_sub_folder_is_for_all_pictures_of_its_name(load):
    _, _, _, references = load("after/1_cats/01.png", "after/1_dogs/01.png", "before/01.png")
    assert shades(references) == [2, 2]


@pytest.mark.parametrize("inside", ["birds", "cats"])
def test_a_reference_that_may_belong_to_several_pictures_is_refused(load, inside):
    message = (
        "1_cats/01.png and 2_cats/01.png have the same name, so it is not clear whose reference 01.png in 'before' is"
    )
    with pytest.raises(ValueError, match=message):
        load("after/1_cats/01.png", "after/2_cats/01.png", f"before/{inside}/01.png")


def test_mirrored_pictures_have_mirrored_references(load):
    images, _, _, references = load("after/a.png", "before/a.png", "before/a_1.png", flip=True)
    assert shades(references) == [1, 2, 1, 2]
    assert [image[0, 0, -1, 0].item() > 0.5 for image in references] == [False, False, True, True]
    assert len(images) == 2


def test_a_picture_that_counts_twice_has_its_references_twice(load):
    images, _, _, references = load("after/2_toy/a.png", "before/a.png")
    assert (len(images), shades(references)) == (2, [1, 1])


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["after/a.png", "after/b.png", "before/a.png"], {}, "b.png has no reference: the folder 'before' holds no picture named 'b'"),
        (["after/a.png", "after/b.png", "before/a.png", "before/b.png", "before/b_1.png"], {},
         "b.png has 2 references in the folder 'before', and a.png has 1"),
        (["after/a.png"], {"reference_folder": "nowhere"}, "There is no folder 'nowhere'"),
        (["after/a.png"], {"reference_folder": "after"}, "`reference_folder` is the folder of the pictures itself"),
    ],
)  # fmt: skip
def test_references_that_are_missing_are_named(load, names, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        load(*names, **settings)


def test_references_with_transparent_parts_are_put_on_white_and_named(load, nodes, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(nodes.load_training_folder.NodeProgress, "say", lambda self, text: said.append(text))
    load("after/a.png", "after/b.png", "before/a.png", "before/b.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "input" / "before" / "b.png")
    references = load()[3]
    assert references[1].min() == 1.0
    assert said[-1].splitlines() == [
        "1 of 2 references is partly transparent and shown on white: b.png.", "Pictures: 2; captions: none; references: 2",
    ]  # fmt: skip


def test_without_a_reference_folder_there_are_no_references(load):
    assert load("after/a.png", "before/a.png", reference_folder="none")[3] == []

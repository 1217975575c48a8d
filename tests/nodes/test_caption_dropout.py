"""Caption dropout, from the node to the trained LoRA."""

from __future__ import annotations

import node_helpers
import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError

from .conftest import Listed
from .test_references import WHOLE, before, references_of  # noqa: F401 - a fixture


@pytest.fixture
def empty(tiny):
    """A CONDITIONING of another text, shorter than the captions."""
    return [[torch.full_like(tiny.captions((3,))[0][0][0], 0.25), dict(tiny.captions((3,))[0][0][1])]]


def unchanged(draw):
    """Everything of a draw but its caption."""
    return (draw.picture, draw.sigma, draw.side, draw.top, draw.left, draw.noise_seed)


def without(plan, one):
    return [unchanged(draw) for draw in plan] == [unchanged(draw) for draw in one]


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (1.0, 6), (0.17, 1)])
def test_a_share_of_the_examples_has_the_empty_caption_and_the_rest_is_the_same(bench, empty, share, count):
    plain = bench.precompute()[0]
    residuals = bench.precompute(caption_dropout=share, empty_caption=empty)[0]
    assert residuals.dropped == [draw.caption for draw in residuals.schedule].count(1) == count
    assert without(residuals.schedule, plain.schedule)
    assert torch.equal(residuals.captions[1][0][0], empty[0][0])
    assert torch.equal(residuals.latents, plain.latents)
    assert residuals.identity.key != plain.identity.key


def test_a_share_of_zero_changes_nothing_even_if_an_empty_caption_is_connected(bench, empty):
    plain, given = bench.precompute()[0], bench.precompute(caption_dropout=0.0, empty_caption=empty)[0]
    assert given.schedule.to_json() == plain.schedule.to_json()
    assert given.identity == plain.identity
    assert given.folder == plain.folder
    assert len(given.captions) == 1
    assert given.on_dropped == ""


@pytest.mark.parametrize("storage", ["disk", "chunked", "on the fly"])
def test_training_starts_as_the_whole_model_and_says_the_share(bench, empty, storage, caplog):
    caplog.set_level("INFO")
    residuals = bench.precompute(caption_dropout=0.5, empty_caption=empty, storage=storage)[0]
    trained = bench.train(residuals=residuals, batch_size=2)
    assert storage == "on the fly" or trained.ui["blockskip"][0]["self_check"] < 1e-5
    said = "3 of 6 training examples (50.0%) have the empty caption"
    assert said in caplog.text
    assert said in next(bench.folders.loras.glob("*.html")).read_text(encoding="utf-8")
    assert trained[0].metadata["dropped_captions"] == 3


def test_references_stay(bench, before, empty):  # noqa: F811
    residuals = bench.precompute(references=before, caption_dropout=1.0, empty_caption=empty, **WHOLE)[0]
    plain = bench.precompute(references=before, **WHOLE)[0]
    assert without(residuals.schedule, plain.schedule)
    for draw, own in zip(residuals.schedule, plain.schedule, strict=True):
        caption = residuals.captions[draw.caption]
        assert torch.equal(caption[0][0], empty[0][0])
        assert torch.equal(references_of(caption)[0], references_of(plain.captions[own.caption])[0])
    assert len(residuals.captions) == 6  # one for each picture, and its empty one
    assert bench.train(residuals=residuals).ui["blockskip"][0]["self_check"] < 1e-5


def test_references_of_host_nodes_and_their_method_stay(bench, before, empty):  # noqa: F811
    captions = Listed(
        node_helpers.conditioning_set_values(
            bench.prompt, {"reference_latents": [bench.vae.encode(x)], "reference_latents_method": "offset"}
        )
        for x in before
    )
    residuals = bench.precompute(positive=captions, caption_dropout=0.5, empty_caption=empty)[0]
    for draw in residuals.schedule:
        caption, own = residuals.captions[draw.caption][0], captions[draw.picture][0]
        assert caption[1]["reference_latents"][0] is own[1]["reference_latents"][0]
        assert caption[1]["reference_latents_method"] == "offset"
        assert torch.equal(caption[0], empty[0][0] if draw.caption >= 3 else own[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda empty: {"caption_dropout": 0.1}, "caption_dropout is 0.1, but there is no empty caption. Connect CLIP"),
        (lambda empty: {"caption_dropout": 1.5, "empty_caption": empty}, "must be between 0 and 1, got 1.5"),
        (lambda empty: {"caption_dropout": float("nan"), "empty_caption": empty}, "must be between 0 and 1, got nan"),
        (lambda empty: {"caption_dropout": 0.1, "empty_caption": Listed([empty, empty])}, "one conditioning, got 2"),
        (lambda empty: {"caption_dropout": 0.1, "empty_caption": [*empty, *empty]}, "`empty_caption` cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_encoded(bench, empty, changes, message):
    with pytest.raises(InvalidInputError, match=message):
        bench.precompute(**changes(empty))
    assert bench.vae.encoded == 0

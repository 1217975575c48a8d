"""Kinds of pictures and captions in training sets: each is used as intended, refused by name, or reported by name."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SIDE = 48


def noisy(low: float, high: float, seed: int) -> Tensor:
    """A picture of values spread evenly over a range, including both ends."""
    values = torch.linspace(low, high, SIDE * SIDE * 3)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))].view(1, SIDE, SIDE, 3)


SEEDS = st.integers(0, 99)
USUAL = st.one_of(
    st.builds(lambda seed: noisy(0.0, 1.0, seed), SEEDS),
    st.builds(lambda seed: noisy(0.3, 0.6, seed), SEEDS),
    st.builds(lambda seed, by: noisy(-by, 1.0 + by, seed), SEEDS, st.floats(0.001, 0.09)),  # resampling overshoots
    st.builds(lambda seed, dtype: noisy(0.0, 1.0, seed).to(dtype), SEEDS, st.sampled_from([torch.float16, torch.bfloat16, torch.float64])),
    st.builds(lambda seed: torch.cat([noisy(0.0, 1.0, seed), torch.ones(1, SIDE, SIDE, 1)], dim=-1), SEEDS),
)  # fmt: skip
REFUSED = st.one_of(
    st.builds(lambda seed, high: noisy(0.0, high, seed), SEEDS, st.sampled_from([2.0, 100.0, 255.0, 65535.0])),
    st.builds(lambda seed, low: noisy(low, 1.0, seed), SEEDS, st.sampled_from([-1.0, -2.0])),
    st.builds(lambda seed: noisy(-0.5, 0.5, seed), SEEDS),
    st.builds(lambda seed, dtype: noisy(0.0, 255.0, seed).to(dtype), SEEDS, st.sampled_from([torch.uint8, torch.int16, torch.int32])),
    st.builds(lambda seed: noisy(0.0, 1.0, seed) > 0.5, SEEDS),
    st.builds(lambda value: torch.full((1, SIDE, SIDE, 3), value), st.sampled_from([float("nan"), float("inf"), -float("inf")])),
    st.builds(lambda colours: torch.rand(1, SIDE, SIDE, colours), st.sampled_from([0, 1, 2, 5])),
    st.just(torch.rand(1, 3, SIDE, SIDE)), st.just(torch.rand(SIDE, SIDE, 3)), st.just(torch.rand(1, 1, SIDE, SIDE, 3)),
    st.just(torch.rand(1, 20, 30, 3)), st.sampled_from([None, "cat.png", 3, {"samples": torch.zeros(1)}]),
)  # fmt: skip


def almost(colour: float, seed: int) -> Tensor:
    """A picture of one colour with a little noise, and a few pixels that differ."""
    generator = torch.Generator().manual_seed(seed)
    picture = (colour + 0.004 * torch.randn(1, SIDE, SIDE, 3, generator=generator)).clamp(0.0, 1.0)
    picture.view(-1)[:9] = 1.0 - colour
    return picture


BLANK = st.builds(almost, st.sampled_from([0.0, 0.2, 0.5, 1.0]), SEEDS)
WORDS = {0.0: "black", 1.0: "white"}


@pytest.fixture(scope="module")
def world(nodes, tiny, run_node, core, tmp_path_factory):
    import folder_paths

    from ..nodes.conftest import Listed, TinyVae

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(tmp_path_factory.mktemp("output")))
        model, captions = tiny.tiny_flux(), tiny.captions([5] * 6)
        selection = run_node(
            nodes.SelectBlocks, model=model, positive=captions[0], method="manual", skip_ratio=0.5, front=2, back=1
        )[0]

        def precompute(images, positive=captions[0], files=None):
            return run_node(
                nodes.PrecomputeResiduals, model=model, vae=TinyVae(), images=Listed(images), positive=positive,
                selection=selection, draws=2, patch_min=32, patch_max=48, storage="on the fly", seed=3,
                **({} if files is None else {"files": Listed(files)}),
            )[0]  # fmt: skip

        yield SimpleNamespace(
            precompute=precompute, captions=captions, listed=Listed, error=core("errors").InvalidInputError,
            file=core("hosts.inputs.material").TrainingFile,
        )  # fmt: skip


def mixed(usual, odd, place):
    """Pictures with one odd one among them, and its number."""
    place = min(place, len(usual))
    return [*usual[:place], odd, *usual[place:]], place + 1


@settings(max_examples=25)
@given(pictures=st.lists(USUAL, min_size=1, max_size=3))
def test_usual_pictures_are_taken_without_a_word(world, pictures):
    assert list(world.precompute(pictures).remarks) == []


@settings(max_examples=50)
@given(usual=st.lists(USUAL, max_size=3), odd=REFUSED, place=st.integers(0, 3))
def test_what_is_no_picture_is_refused_by_its_number(world, usual, odd, place):
    pictures, number = mixed(usual, odd, place)
    with pytest.raises(world.error) as refused:
        world.precompute(pictures)
    assert re.match(
        rf"Picture {number}\b|1 of {len(pictures)} pictures is smaller .*: number {number} ", str(refused.value)
    )


@settings(max_examples=15)
@given(usual=st.lists(USUAL, max_size=3), odd=REFUSED, place=st.integers(0, 3))
def test_what_is_no_picture_is_refused_by_its_file(world, usual, odd, place):
    pictures, number = mixed(usual, odd, place)
    files = [world.file(f"{index}.png", "a toy") for index in range(1, len(pictures) + 1)]
    with pytest.raises(world.error) as refused:
        world.precompute(pictures, files=files)
    unknown = str(refused.value).startswith(f"Picture {number} ") and isinstance(odd, Tensor) is False
    named = f"{number}.png" in str(refused.value)
    as_latents = str(refused.value).startswith("Input ") and isinstance(
        odd, dict
    )  # one LATENT makes all of them latents
    badly_shaped = "must come in the shape" in str(refused.value)  # raised before the number of pictures is known
    assert named or unknown or as_latents or badly_shaped


@settings(max_examples=25)
@given(usual=st.lists(USUAL, max_size=3), blank=BLANK, place=st.integers(0, 3))
def test_a_picture_of_one_colour_is_named(world, usual, blank, place):
    pictures, number = mixed(usual, blank, place)
    [remark] = world.precompute(pictures).remarks
    colour = WORDS.get(round(float(blank.median()), 1), "one colour")
    assert remark.startswith(
        f"1 of {len(pictures)} pictures is all of one colour, or almost: number {number} ({colour}). "
    )


@settings(max_examples=10)
@given(usual=st.lists(USUAL, max_size=2), seed=SEEDS, hidden=st.floats(0.05, 1.0), place=st.integers(0, 2))
def test_a_transparent_picture_is_named(world, usual, seed, hidden, place):
    alpha = torch.ones(1, SIDE, SIDE, 1)
    alpha[:, : max(1, round(SIDE * hidden))] = 0.0
    pictures, number = mixed(usual, torch.cat([noisy(0.0, 1.0, seed), alpha], dim=-1), place)
    [remark] = world.precompute(pictures).remarks
    assert remark.startswith(f"1 of {len(pictures)} pictures is partly transparent: number {number}. ")


@settings(max_examples=25)
@given(which=st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_captions_that_are_the_same_by_accident_are_noticed(world, which):
    """Two of many may well be equal."""
    positive = world.listed([[entry[0], dict(entry[1])]] for [entry] in (world.captions[index] for index in which))
    remarks = list(world.precompute([noisy(0.0, 1.0, seed) for seed in range(len(which))], positive).remarks)
    most = max(which.count(index) for index in which)
    if most == len(which):
        assert remarks[0].startswith(f"All {most} captions are the same.")
    elif most > 2:
        assert remarks[0].startswith(f"{most} of {len(which)} captions are the same.")
    else:
        assert remarks == []


@settings(max_examples=10)
@given(repeats=st.integers(2, 4))
def test_a_picture_that_is_repeated_repeats_its_caption(world, repeats):
    positive = world.listed(world.captions[:2] * repeats)
    assert list(world.precompute([noisy(0.0, 1.0, seed) for seed in (1, 2)] * repeats, positive).remarks) == []


@settings(max_examples=15)
@given(texts=st.lists(st.sampled_from(["", "a toy", "a dog"]), min_size=2, max_size=6))
def test_captions_that_are_empty_are_named(world, texts):
    files = [world.file(f"{index}.png", text) for index, text in enumerate(texts)]
    pictures = [noisy(0.0, 1.0, seed) for seed in range(len(texts))]
    remarks = list(world.precompute(pictures, world.listed(world.captions[: len(texts)]), files).remarks)
    empty = [file.name for file in files if not file.caption]
    if not empty:
        assert remarks == []
    elif len(empty) == len(texts):
        assert remarks[0].startswith(f"None of the {len(texts)} pictures has a caption. ")
    else:
        assert remarks[0].startswith(
            f"{len(empty)} of {len(texts)} captions are missing or empty: {', '.join(empty)}. "
        )

"""Crop sides (Eq. 1), reference pictures, crops and their resizing."""

from random import Random

import pytest
import torch
from blockskip_pack.blockskip_core.data.patch_sampling import (
    PatchConfig,
    crop_and_resize,
    crop_side,
    reference_size,
    resize,
)
from blockskip_pack.blockskip_core.data.schedule import largest_crop
from blockskip_pack.blockskip_core.errors import InvalidInputError

CONFIGS = [
    PatchConfig(patch_min=256, patch_max=512),
    PatchConfig(patch_min=512, patch_max=1024, multiple=32),
    PatchConfig(patch_min=16, patch_max=16),
    PatchConfig(patch_min=48, patch_max=400, multiple=8),
]
GRID = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.patch_min}-{c.patch_max}/{c.multiple}")
def test_crop_side_is_equation_1_rounded_to_the_nearest_multiple(config):
    sides = [crop_side(t, config) for t in GRID]
    for t, side in zip(GRID, sides, strict=True):
        exact = config.patch_min + t * (config.patch_max - config.patch_min)
        assert abs(side - exact) <= config.multiple / 2
        assert side % config.multiple == 0
        assert config.patch_min <= side <= config.patch_max
    assert sides == sorted(sides)
    assert (sides[0], sides[-1]) == (config.patch_min, config.patch_max)


def test_crop_side_rounds_halves_up():
    config = PatchConfig(patch_min=16, patch_max=48)
    assert crop_side(0.25, config) == 32


def test_high_to_low_mirrors_low_to_high():
    low, high = (PatchConfig(patch_min=64, patch_max=512, order=order) for order in ("low-to-high", "high-to-low"))
    steps = [i / 64 for i in range(65)]
    assert [crop_side(t, high) for t in steps] == [crop_side(1.0 - t, low) for t in steps]


def test_fixed_order_always_takes_the_largest_crop():
    config = PatchConfig(patch_min=64, patch_max=512, order="fixed")
    assert {crop_side(t, config) for t in GRID} == {512}


def test_random_order_covers_the_range_and_ignores_the_noise_level():
    config = PatchConfig(patch_min=64, patch_max=128, order="random")
    rng = Random(0)
    sides = [crop_side(1.0, config, rng=rng) for _ in range(500)]
    assert set(sides) == {64, 80, 96, 112, 128}
    assert sides == [crop_side(0.0, config, rng=rng) for rng in [Random(0)] for _ in range(500)]


def test_only_the_random_order_reads_the_random_source():
    rng = Random(0)
    state = rng.getstate()
    for order in ("low-to-high", "high-to-low", "fixed"):
        crop_side(0.4, PatchConfig(patch_min=64, patch_max=128, order=order), rng=rng)
    assert rng.getstate() == state


@pytest.mark.parametrize("largest", [64, 100, 300, 511, 512, 4000])
def test_crop_side_never_exceeds_what_the_picture_has_room_for(largest):
    config = PatchConfig(patch_min=64, patch_max=512)
    sides = [crop_side(t, config, largest=largest) for t in GRID]
    assert max(sides) == min(512, largest // 16 * 16)
    assert min(sides) == 64
    assert sides == sorted(sides)
    assert all(side % 16 == 0 for side in sides)


@pytest.mark.parametrize("t", [-0.001, 1.001, float("nan"), float("inf")])
def test_a_noise_level_outside_0_to_1_is_refused(t):
    with pytest.raises(InvalidInputError, match=r"noise level must be in \[0, 1\]"):
        crop_side(t, CONFIGS[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_min": 100, "patch_max": 512}, r"patch_min must be a positive multiple of 16 px.*Try 96 or 112"),
        ({"patch_min": 256, "patch_max": 500}, "patch_max must be a positive multiple"),
        ({"patch_min": 0, "patch_max": 512}, "patch_min must be a positive multiple"),
        ({"patch_min": -16, "patch_max": 512}, r"Try 16 or 32"),
        ({"patch_min": 512, "patch_max": 256}, "patch_min must not be larger than patch_max"),
        ({"patch_min": 256, "patch_max": 512, "order": "sideways"}, "Patch order must be one of low-to-high"),
    ],
)
def test_unusable_patch_settings_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        PatchConfig(**settings)


def test_reference_size_scales_down_to_patch_max_and_never_up():
    config = PatchConfig(patch_min=64, patch_max=128)
    rng = Random(1)
    for _ in range(500):
        height, width = rng.randint(64, 900), rng.randint(64, 900)
        new_height, new_width = reference_size(height, width, config)
        assert new_height <= height
        assert new_width <= width
        if min(height, width) <= 128:
            assert (new_height, new_width) == (height, width)
        else:
            assert min(new_height, new_width) == 128
            scale = 128 / min(height, width)
            assert abs(new_height - height * scale) <= 0.5
            assert abs(new_width - width * scale) <= 0.5


def test_a_picture_smaller_than_the_patch_is_refused_with_its_size():
    with pytest.raises(InvalidInputError, match="300 x 60 px is smaller than the patch of 64 px"):
        reference_size(60, 300, PatchConfig(patch_min=64, patch_max=128))


def test_largest_crop_is_a_multiple_that_fits_the_reference_picture():
    config = PatchConfig(patch_min=64, patch_max=128)
    assert largest_crop(100, 300, config) == 96
    assert largest_crop(64, 64, config) == 64
    assert largest_crop(1000, 700, config) == 128


def test_shrinking_a_checkerboard_gives_grey():
    checkers = (torch.arange(48).view(-1, 1) + torch.arange(48)) % 2
    picture = checkers.float().unsqueeze(-1).expand(48, 48, 3)
    small = resize(picture, 16, 16)
    assert small.shape == (16, 16, 3)
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0.0)


def test_resizing_stays_in_range_and_keeps_rows_columns_and_colours_apart():
    picture = torch.zeros(40, 24, 3)
    picture[:20, :, 0] = 1.0  # the upper half is red, the left half is green
    picture[:, :12, 1] = 1.0
    small = resize(picture, 20, 8)
    assert small.shape == (20, 8, 3)
    assert small.min() >= 0.0  # bicubic overshoots at edges
    assert small.max() <= 1.0
    assert small[2, 6].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-3)
    assert small[17, 1].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-3)


def test_resizing_to_the_same_size_returns_the_picture_itself():
    picture = torch.rand(5, 7, 3)
    assert resize(picture, 5, 7) is picture


def test_a_crop_of_patch_size_is_cut_out_unchanged():
    picture = torch.rand(40, 50, 3)
    crop = crop_and_resize(picture, top=3, left=11, crop=(16, 16), size=(16, 16))
    assert torch.equal(crop, picture[3:19, 11:27])


def test_a_larger_crop_is_resized_to_the_patch():
    picture = torch.rand(40, 50, 3)
    crop = crop_and_resize(picture, top=8, left=2, crop=(32, 32), size=(16, 16))
    assert torch.equal(crop, resize(picture[8:40, 2:34], 16, 16))

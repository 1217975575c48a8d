"""Training pictures in the shape of their pictures: sizes of about equal area, and crops of their proportions."""

import math
from random import Random

import pytest
import torch
from blockskip_pack.blockskip_core.data.buckets import bucket_of, bucket_sizes, training_sizes
from blockskip_pack.blockskip_core.data.crops import TrainingCrops
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig, reference_size
from blockskip_pack.blockskip_core.data.schedule import TrainingSchedule, draw_schedule, largest_crop
from blockskip_pack.blockskip_core.errors import InvalidInputError

CONFIGS = [
    PatchConfig(patch_min=side, patch_max=2 * side, multiple=multiple)
    for side, multiple in ((256, 16), (512, 32), (1024, 64), (96, 32), (64, 64))
]
SIZES = [(64, 64), (300, 100), (90, 130), (1000, 200)]
PATCHES = PatchConfig(patch_min=64, patch_max=128)


def draw(sizes=SIZES, patches=PATCHES, shape="as pictures", **changes):
    settings = {"num_captions": 1, "num_draws": 40, "seed": 7, **changes}
    return draw_schedule(
        sizes, patches=patches, shape=shape, **settings,
        sample_sigmas=lambda count, generator: torch.rand(count, generator=generator).clamp_min(1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_size_has_more_tokens_than_the_square_and_none_could_be_wider(config):
    side, cell = config.patch_min, config.multiple
    sizes = bucket_sizes(config)
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % cell == width % cell == 0
        assert height * width <= side * side
        assert height * (width + cell) > side * side or width + cell > 2 * side
        assert side / 2 <= min(height, width) <= max(height, width) <= 2 * side


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_picture_gets_the_nearest_proportions(config):
    rng = Random(3)
    for _ in range(200):
        height, width = rng.randint(100, 4000), rng.randint(100, 4000)
        rows, columns = bucket_of(height, width, config)
        off = abs(math.log(columns / rows * height / width))
        assert all(off <= abs(math.log(w / h * height / width)) + 1e-12 for h, w in bucket_sizes(config))
    assert bucket_of(777, 777, config) == (config.patch_min, config.patch_min)


def test_square_pictures_have_the_schedule_of_squares():
    square = [(100, 100), (64, 64), (500, 500)]
    assert training_sizes(square, PATCHES, "as pictures") == ()
    assert draw(square).to_json() == draw(square, shape="square").to_json()
    assert draw(shape="square").sizes == ()


def test_every_crop_lies_inside_its_picture_with_the_proportions_of_its_size():
    schedule = draw(num_draws=400)
    reached = set()
    for one in schedule:
        rows, columns = schedule.size_of(one.picture)
        height, width = reference_size(*SIZES[one.picture], PATCHES, (rows, columns))
        crop = schedule.crop_of(one)
        assert one.top + crop[0] <= height <= SIZES[one.picture][0]
        assert one.left + crop[1] <= width <= SIZES[one.picture][1]
        assert max(abs(crop[0] - rows * one.side / 64), abs(crop[1] - columns * one.side / 64)) <= 0.5
        assert 64 <= one.side <= largest_crop(*SIZES[one.picture], PATCHES, (rows, columns))
        reached.add((one.picture, one.side))
    assert {(0, 64), (3, 128)} <= reached


def test_the_largest_crop_of_a_whole_picture_shows_nearly_all_of_it():
    patches = PatchConfig(patch_min=256, patch_max=256, order="fixed")
    rng = Random(1)
    for _ in range(200):
        height, width = rng.randint(520, 2000), rng.randint(520, 2000)
        size = bucket_of(height, width, patches)
        reference = reference_size(height, width, patches, size)
        assert math.prod(size) > 0.9 * math.prod(reference)


def test_crops_have_the_sizes_of_their_pictures():
    schedule = draw()
    pictures = [torch.rand(*size, 3) for size in SIZES]
    crops = TrainingCrops(pictures, schedule)
    assert {tuple(crop.shape[:2]) for crop in crops} == set(schedule.sizes)
    whole = draw([(96, 48)], PatchConfig(patch_min=64, patch_max=64), num_draws=1)
    assert whole.sizes == ((80, 48),)
    assert whole.crop_of(whole[0]) == (80, 48)
    picture = torch.rand(96, 48, 3)
    assert torch.equal(TrainingCrops([picture], whole)[0], picture[whole[0].top : whole[0].top + 80])


def test_a_schedule_with_sizes_survives_json_and_has_a_version_of_its_own():
    schedule = draw()
    assert TrainingSchedule.from_json(schedule.to_json()) == schedule
    assert '"version":2' in schedule.to_json()
    assert '"version":1' in draw(shape="square").to_json()
    assert schedule.fingerprint != draw(shape="square").fingerprint


def test_a_picture_smaller_than_its_size_is_refused():
    with pytest.raises(
        InvalidInputError,
        match=r"1 of 2 pictures is smaller than their smallest crop: number 2 \(32 x 90 px, needs 32 x 96\)",
    ):
        draw([(300, 300), (90, 32)])
    with pytest.raises(InvalidInputError, match="Patch shape must be one of square, as pictures, got 'round'"):
        draw(shape="round")

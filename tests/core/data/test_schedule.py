"""The frozen training schedule."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig, crop_side, reference_size
from blockskip_pack.blockskip_core.data.schedule import Draw, TrainingSchedule, draw_schedule
from blockskip_pack.blockskip_core.errors import CacheError, InvalidInputError

SIZES = [(64, 90), (200, 100), (130, 131), (500, 300)]
PATCHES = PatchConfig(patch_min=64, patch_max=128)


def uniform(count, generator):
    return torch.rand(count, generator=generator).clamp_min(1e-3)


def draw(**changes):
    settings = {"num_captions": 4, "num_draws": 10, "patches": PATCHES, "sample_sigmas": uniform, "seed": 7}
    return draw_schedule(changes.pop("sizes", SIZES), **{**settings, **changes})


def test_the_same_seed_replays_the_same_schedule():
    assert draw() == draw()
    assert draw().fingerprint == draw().fingerprint
    assert draw(seed=8).draws != draw().draws


def test_the_global_random_state_plays_no_part():
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert draw() == first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("order", ["low-to-high", "random"])
def test_a_schedule_survives_json(order):
    schedule = draw(patches=PatchConfig(patch_min=64, patch_max=128, order=order), timesteps="uniform")
    read = TrainingSchedule.from_json(schedule.to_json())
    assert read == schedule
    assert read.to_json() == schedule.to_json()
    assert read.fingerprint == schedule.fingerprint


def test_every_field_of_a_draw_and_of_the_schedule_changes_the_fingerprint():
    schedule = draw()
    changed = [
        dataclasses.replace(schedule, seed=99),
        dataclasses.replace(schedule, timesteps="other"),
        dataclasses.replace(schedule, draws=schedule.draws[:-1]),
        dataclasses.replace(schedule, draws=schedule.draws[::-1]),
    ]
    for field in dataclasses.fields(PATCHES):
        value = {"multiple": 8, "order": "fixed", "patch_max": 256, "patch_min": 80}[field.name]
        changed.append(dataclasses.replace(schedule, patches=dataclasses.replace(PATCHES, **{field.name: value})))
    for field in dataclasses.fields(Draw):
        last = schedule.draws[-1]
        value = getattr(last, field.name) + (0.5**30 if field.name == "sigma" else 1)
        row = dataclasses.replace(last, **{field.name: value})
        changed.append(dataclasses.replace(schedule, draws=(*schedule.draws[:-1], row)))
    fingerprints = {schedule.fingerprint, *(other.fingerprint for other in changed)}
    assert len(fingerprints) == 1 + len(changed)


@pytest.mark.parametrize("num_draws", [1, 4, 9, 400])
def test_every_picture_is_drawn_equally_often(num_draws):
    counts = Counter(one.picture for one in draw(num_draws=num_draws))
    seen = [counts[picture] for picture in range(len(SIZES))]
    assert sum(seen) == num_draws
    assert max(seen) - min(seen) <= 1


def test_the_rounds_are_shuffled_anew():
    pictures = [one.picture for one in draw(num_draws=40)]
    assert len({tuple(pictures[start : start + 4]) for start in range(0, 40, 4)}) > 1


def test_one_caption_serves_all_pictures_and_many_captions_follow_theirs():
    assert {one.caption for one in draw(num_captions=1)} == {0}
    assert all(one.caption == one.picture for one in draw(num_captions=4))


def test_every_crop_lies_inside_its_picture_and_follows_equation_1():
    schedule = draw(num_draws=1000)
    for one in schedule:
        height, width = reference_size(*SIZES[one.picture], PATCHES)
        assert 0 <= one.top <= height - one.side
        assert 0 <= one.left <= width - one.side
        room = min(128, min(height, width) // 16 * 16)
        assert one.side == crop_side(one.sigma, PATCHES, largest=room)
        assert 0.0 < one.sigma <= 1.0


def test_crops_reach_every_edge_of_the_picture():
    schedule = draw(sizes=[(66, 67)], num_captions=1, num_draws=300, patches=PatchConfig(patch_min=64, patch_max=80))
    assert {one.top for one in schedule} == {0, 1, 2}
    assert {one.left for one in schedule} == {0, 1, 2, 3}


def test_noise_follows_from_its_seed_alone():
    one = draw()[0]
    torch.manual_seed(3)
    noise = one.noise((2, 3, 5))
    torch.manual_seed(4)
    assert torch.equal(one.noise((2, 3, 5)), noise)
    assert torch.equal(one.noise((2, 3, 5), torch.float64), noise.double())
    assert not torch.equal(dataclasses.replace(one, noise_seed=one.noise_seed + 1).noise((2, 3, 5)), noise)
    expected = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(one.noise_seed))
    assert torch.equal(noise, expected)


def test_every_draw_has_noise_of_its_own():
    schedule = draw(num_draws=300)
    assert len({one.noise_seed for one in schedule}) == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, "No pictures came in"),
        ({"sizes": SIZES[:3], "num_captions": 2}, "each of the 3 pictures, got 2 captions"),
        ({"num_captions": 0}, "got 0 captions"),
        ({"num_draws": 0}, "At least one training example is needed, got 0"),
        (
            {"sizes": [(64, 64), (63, 400)], "num_captions": 1},
            r"^1 of 2 pictures is smaller than the patch of 64 px: number 2 \(400 x 63 px\)",
        ),
    ],
)
def test_inputs_that_cannot_be_drawn_from_are_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        draw(**changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "not json", "null", '{"version": 1, "draws": 3}'])
def test_text_that_is_no_schedule_is_refused(text):
    with pytest.raises(CacheError, match="schedule"):
        TrainingSchedule.from_json(text)


def test_another_format_version_is_refused():
    content = json.loads(draw().to_json())
    content["version"] = 3
    with pytest.raises(CacheError, match="format 3, this version reads up to 2"):
        TrainingSchedule.from_json(json.dumps(content))

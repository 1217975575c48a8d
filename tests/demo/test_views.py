"""The transformer's training views: captions are true of windows, and none is held out for the test."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"


@pytest.fixture
def views(demo) -> ModuleType:
    """The views."""
    return demo("world_views")


def some_views(views: ModuleType, count: int, size: tuple[int, int] = (128, 128)) -> list:
    rng = random.Random(7)
    return [views.random_view(rng, size) for _ in range(count)]


def test_a_whole_view_is_the_scene_with_its_whole_caption(views: ModuleType, world: ModuleType) -> None:
    whole = [view for view in some_views(views, 60, (192, 128)) if view.whole]
    assert len(whole) > 20
    for view in whole:
        assert view.captions()[0] == world.caption(view.scene)
        assert view.captions()[3] == world.caption(view.scene, sized=False, placed=False)
    assert (np.asarray(whole[0].draw()) == np.asarray(world.render(whole[0].scene, (192, 128)))).all()


def test_a_plain_bucket_has_whole_scenes_without_creatures(demo, world: ModuleType) -> None:
    data = demo("world_data")
    shown = data.part_views(data.LARGE, 0, 0)
    assert len(shown) == data.LARGE.views
    assert all(view.whole and view.size == (512, 512) and not world.is_creature(view.scene) for view in shown)


@pytest.mark.parametrize("size", [(128, 128), (192, 128), (256, 320)])
def test_every_view_has_its_size_and_shows_enough_of_the_object(views: ModuleType, size: tuple[int, int]) -> None:
    for view in some_views(views, 40, size):
        assert view.draw().size == size
        assert view.seen() >= views.LEAST_SEEN
        left, top, right, bottom = view.box
        assert 0 <= left < right <= view.canvas[0]
        assert 0 <= top < bottom <= view.canvas[1]
        assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])


def test_what_is_said_of_a_window_is_what_the_reader_sees_in_it(views: ModuleType, demo, world: ModuleType) -> None:
    reading = demo("world_reader")
    windows = [view for view in some_views(views, 1000) if not view.whole and view.seen() > 0.999]
    windows = [view for view in windows if view.scene.finish != world.CRITTER]  # which the reader has not seen
    told = [view.told() for view in windows]
    pixels = torch.stack([torch.from_numpy(np.array(view.draw())) for view in windows]).permute(0, 3, 1, 2) / 255
    read = reading.read(reading.load_reader(ASSETS / "blockskip_world_reader.safetensors"), pixels)
    sizes = [answer["size"] == scene.size for answer, (scene, sized, _) in zip(read, told, strict=True) if sized]
    places = [answer["place"] == scene.place for answer, (scene, _, placed) in zip(read, told, strict=True) if placed]
    assert min(len(sizes), len(places)) > 20
    assert min(sum(sizes) / len(sizes), sum(places) / len(places)) > 0.95
    unsaid = [view for view, (_, sized, placed) in zip(windows, told, strict=True) if not sized and not placed]
    assert len(unsaid) >= 10
    for view in unsaid:
        words = view.captions()[0].replace(",", " ").split()
        assert not {*world.SIZES, *world.PLACES} & set(words)


def test_held_out_captions_are_in_no_training_picture(demo, world: ModuleType) -> None:
    data = demo("world_data")
    held_out = {world.caption(scene) for scene in data.held_out_scenes(200)}
    assert len(held_out) == 200
    for size, shards in data.FIRST_SHARDS.items():
        for number in range(shards):
            rng = random.Random(f"0/{size}/{number}")
            assert not held_out & {world.caption(world.random_scene(rng)) for _ in range(data.FIRST_SHARD)}
    shown = [view for bucket in (*data.BUCKETS, data.LARGE) for view in data.part_views(bucket, 0, 0)]
    assert not held_out & {text for view in shown for text in view.captions()}


def test_more_held_out_captions_than_there_are_is_refused(demo) -> None:
    with pytest.raises(ValueError, match="only 200 captions are kept out of the training, not 201"):
        demo("world_data").held_out_scenes(201)


def test_an_object_weighs_as_much_as_its_ground(demo, views: ModuleType, world: ModuleType) -> None:
    small = views.View(
        world.Scene("star", "red", "small", "plain", "sand", "top", 1), (192, 128), (0, 0, 192, 128), (192, 128)
    )
    weights = demo("world_data").object_weights(small).float()
    assert weights.shape == (16, 24)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    inside = weights == weights.max()
    rows, columns = inside.nonzero().float().mean(0).tolist()
    assert (rows / 16, columns / 24) == pytest.approx((0.28, 0.5), abs=0.06)
    assert weights[inside].mean() / weights[~inside].mean() == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("size", [(256, 192), (192, 256)])
def test_rectangles_are_read_in_the_square_where_the_place_reads_the_same(demo, world: ModuleType, size) -> None:
    evaluation, reading = demo("evaluate_world"), demo("world_reader")
    scenes = demo("world_data").held_out_scenes(60)
    drawn = demo("world_data").to_tensor([world.render(scene, size) for scene in scenes]).float() / 255
    reader = reading.load_reader(ASSETS / "blockskip_world_reader.safetensors")
    answers = reading.read(reader, evaluation.reading_windows(drawn, scenes))
    for name, least in (("shape", 0.98), ("place", 0.98), ("size", 0.98), ("finish", 0.98)):
        right = [answer[name] == getattr(scene, name) for answer, scene in zip(answers, scenes, strict=True)]
        assert sum(right) / len(right) >= least, name
    elsewhere = [world.Scene(**{**vars(scene), "place": OPPOSITE[scene.place]}) for scene in scenes]
    wrong = reading.read(reader, evaluation.reading_windows(drawn, elsewhere))
    assert not any(answer["place"] == scene.place for answer, scene in zip(wrong, elsewhere, strict=True))


OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "centre": "left"}

"""The world's pictures and captions: reproducible, and suitable for training."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"
DIGESTS = """
import hashlib, random, sys
sys.path.insert(0, sys.argv[1])
import world
rng = random.Random(5)
scenes = [world.random_scene(rng) for _ in range(6)] + [world.subject_scenes(name, 1, 0)[0] for name in world.SUBJECTS]
print(hashlib.sha256(b"".join(world.render(scene, 64).tobytes() for scene in scenes)).hexdigest())
"""


def scenes(world: ModuleType, count: int = 40) -> list:
    rng = random.Random(3)
    toys = [world.random_scene(rng) for _ in range(count)]
    critters = [world.random_critter(rng) for _ in range(count)]
    return toys + critters + [scene for name in world.SUBJECTS for scene in world.subject_scenes(name, 6, 0)]


def test_pictures_are_the_same_in_every_process() -> None:
    command = [sys.executable, "-c", DIGESTS, str(DEMO)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0].strip()) == 64


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_picture_does_not_depend_on_what_was_drawn_before(world: ModuleType, size: int) -> None:
    first, *others = scenes(world, 3)
    alone = np.asarray(world.render(first, size))
    for scene in others:
        world.render(scene, size)
    assert (np.asarray(world.render(first, size)) == alone).all()
    assert alone.shape == (size, size, 3)


def test_critters_are_drawn_by_their_seed_and_are_never_a_subject(world: ModuleType) -> None:
    looks = {
        np.asarray(
            world.render(world.Scene(shape, "orange", "big", world.CRITTER, "sand", "centre", seed), 64)
        ).tobytes()
        for shape in world.CRITTER_SHAPES
        for seed in range(20)
    }
    assert len(looks) == 40
    subjects = {
        np.asarray(world.render(world.SubjectScene(name, "sand", "centre", 0), 64)).tobytes() for name in world.SUBJECTS
    }
    assert not looks & subjects


def test_another_seed_is_another_picture(world: ModuleType) -> None:
    one, other = (world.SubjectScene("toby", "grass", "left", seed) for seed in (0, 1))
    assert (np.asarray(world.render(one, 64)) != np.asarray(world.render(other, 64))).any()


def test_every_caption_is_made_of_known_words_and_fits(world: ModuleType, demo) -> None:
    known = set(world.VOCABULARY)
    for scene in scenes(world):
        words = world.caption(scene).replace(",", " ,").split()
        assert set(words) <= known
        assert len(words) <= demo("train_world").SENTENCE_LENGTH


def test_pre_training_never_draws_or_names_a_subject(world: ModuleType) -> None:
    rng = random.Random(0)
    drawn = [world.random_scene(rng) for _ in range(2000)]
    assert all(isinstance(scene, world.Scene) and scene.shape in world.SHAPES for scene in drawn)
    assert not any(name in world.caption(scene).split() for scene in drawn for name in world.SUBJECTS)


@pytest.mark.parametrize("size", [(192, 128), (128, 192), (256, 192)])
def test_a_rectangle_has_round_circles_where_the_caption_says(world: ModuleType, size: tuple[int, int]) -> None:
    scene = world.Scene("circle", "red", "big", "plain", "water", "left", 3)
    picture = np.asarray(world.render(scene, size)).astype(int)
    assert picture.shape == (size[1], size[0], 3)
    red = (picture[..., 0] > 200) & (picture[..., 1] < 90)
    rows, columns = red.any(axis=1).nonzero()[0], red.any(axis=0).nonzero()[0]
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    assert np.ptp(rows) == pytest.approx(2 * 0.9 * world.layout(scene).radius * min(size), abs=3)
    assert columns.mean() / size[0] == pytest.approx(0.28, abs=0.03)
    assert rows.mean() / size[1] == pytest.approx(0.5, abs=0.03)


def test_a_picture_longer_than_its_ground_is_refused(world: ModuleType) -> None:
    with pytest.raises(ValueError, match="a picture of 256 x 128 is too long: one side may be 1.5 times the other"):
        world.render(world.Scene("circle", "red", "big", "plain", "water", "left"), (256, 128))


@pytest.mark.parametrize(
    ("said", "caption"),
    [
        ((True, True), "a big orange toby circle on water, left"),
        ((False, True), "an orange toby circle on water, left"),
        ((True, False), "a big orange toby circle on water"),
        ((False, False), "an orange toby circle on water"),
    ],
)
def test_size_and_place_may_be_left_unsaid(world: ModuleType, said: tuple[bool, bool], caption: str) -> None:
    assert world.caption(world.SubjectScene("toby", "water", "left"), *said) == caption
    toy = world.Scene("circle", "orange", "big", "plain", "water", "left")
    assert world.caption(toy, *said) == caption.replace("toby ", "")


def test_held_out_pictures_of_a_subject_stand_on_other_grounds(world: ModuleType) -> None:
    shown = {scene.ground for scene in world.subject_scenes("mila", 6, 0)}
    held_out = {scene.ground for scene in world.subject_scenes("mila", 6, 1, held_out=True)}
    assert len(shown) >= 4
    assert held_out == set(world.HELD_OUT_GROUNDS)
    assert not shown & held_out


def test_subject_folder_can_be_read_back(world: ModuleType, tmp_path: Path) -> None:
    written = world.write_subject_folder(tmp_path, "nori", count=5, size=64)
    assert list(world.read_subject_folder(tmp_path).values()) == [world.caption(scene) for scene in written]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("*.png")], "There is no picture in"),
        (lambda folder: (folder / "02.txt").unlink(), "02.png in .* has no caption: write .* into 02.txt"),
        (lambda folder: (folder / "02.txt").write_text("  \n"), "02.png in .* has no caption"),
        (lambda folder: (folder / "01.txt").write_text("a big toby dog"), "01.txt says 'dog', a word"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(world: ModuleType, tmp_path: Path, spoil, sentence: str) -> None:
    world.write_subject_folder(tmp_path, "pip", count=2, size=64)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        world.read_subject_folder(tmp_path)


def test_an_unknown_subject_is_refused(world: ModuleType) -> None:
    with pytest.raises(ValueError, match="unknown subject 'bob': choose one of toby"):
        world.subject_scenes("bob", 1, 0)

"""Selections by measurement, Eq. 2."""

import json
import math
from random import Random

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.text_influence import (
    TextInfluence,
    cosine_distance,
    measure,
    measured_selection,
    selection_table,
    window_length,
)


def measured(num_blocks, budget, value):
    """A measurement up to a budget; ``value(kind, key)`` gives the distances."""
    influence = TextInfluence(num_blocks)
    for run in influence.missing(budget):
        influence.record(run, value(*run))
    return influence


def test_selecting_minimises_equation_2():
    rng = Random(3)
    for _ in range(300):
        num_blocks = rng.randint(2, 12)
        budget = rng.randint(0, num_blocks - 1)
        influence = measured(num_blocks, budget, lambda *_: rng.random())
        front, back = influence.select(budget)
        best = min(influence.front[n] + influence.back[budget - n] for n in range(budget + 1))
        assert front + back == budget
        assert influence.front[front] + influence.back[back] == best


def test_the_smaller_front_wins_a_tie():
    rng = Random(4)
    for _ in range(200):
        num_blocks = rng.randint(2, 9)
        budget = rng.randint(0, num_blocks - 1)
        influence = measured(num_blocks, budget, lambda *_: float(rng.randint(0, 2)))
        sums = [influence.front[n] + influence.back[budget - n] for n in range(budget + 1)]
        assert influence.select(budget) == (sums.index(min(sums)), budget - sums.index(min(sums)))


def test_one_measurement_serves_every_smaller_budget():
    """Eq. 2 separates: selecting by pictures of each (n, m) equals adding the distances of front and back."""
    rng = Random(5)
    pictures = [({n: rng.random() for n in range(7)}, {m: rng.random() for m in range(7)}) for _ in range(3)]
    sums = {"front": 0, "back": 1}
    influence = measured(9, 6, lambda kind, key: sum(p[sums[kind]][key] for p in pictures) if kind in sums else 0.0)
    for front, back in pictures:
        front[0] = back[0] = 0.0
    for budget in range(7):
        by_picture = {n: sum(front[n] + back[budget - n] for front, back in pictures) for n in range(budget + 1)}
        assert influence.select(budget)[0] == min(by_picture, key=by_picture.get)


def test_what_is_missing_is_what_has_not_been_recorded():
    influence = TextInfluence(8)
    runs = influence.missing(3)
    assert runs["front", 2] == frozenset({0, 1})
    assert runs["back", 2] == frozenset({6, 7})
    length = window_length(8)
    assert runs["window", 1] == frozenset(range(1, 1 + length))
    assert {key for kind, key in runs if kind == "window"} == set(range(8 - length + 1))
    assert ("front", 0) not in runs
    while runs:
        run = next(iter(runs))
        influence.record(run, 0.5)
        runs.pop(run)
        assert influence.missing(3) == runs
    assert set(influence.missing(4)) == {("front", 4), ("back", 4)}


def test_without_the_window_only_the_spans_are_measured():
    assert {kind for kind, _ in TextInfluence(8).missing(3, with_window=False)} == {"front", "back"}


def test_selecting_before_measuring_is_refused():
    influence = measured(8, 2, lambda *_: 0.1)
    with pytest.raises(InvalidInputError, match="4 masked pictures are missing for a budget of 4 blocks"):
        influence.select(4)


@pytest.mark.parametrize("distance", [float("nan"), float("inf")])
def test_a_distance_that_is_not_finite_is_refused(distance):
    influence = TextInfluence(8)
    with pytest.raises(InvalidInputError, match="front run 2 gave a picture that is not finite"):
        influence.record(("front", 2), distance)
    assert 2 not in influence.front


def test_a_measurement_survives_json():
    influence = measured(8, 3, lambda kind, key: key / 7 + len(kind))
    read = TextInfluence.from_json(influence.to_json())
    assert read == influence
    assert read.select(3) == influence.select(3)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"front": 1}', '{"front": {"a": 1}, "back": {}, "window": {}}', "null"]
)
def test_text_that_is_no_measurement_raises_an_ordinary_error(text):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        TextInfluence.from_json(text)


def test_a_measured_selection_is_the_minimum_for_its_ratio():
    influence = measured(10, 5, lambda kind, key: key * (1.0 if kind == "front" else 2.0))
    chosen = measured_selection(influence, 0.5, "flux", [7] * 10)
    assert (chosen.front, chosen.back, chosen.method) == (5, 0, "attention mask")
    assert chosen.skipped_bytes == 35


def test_the_table_lists_every_measured_budget():
    influence = measured(10, 3, lambda kind, key: key * (1.0 if kind == "front" else 2.0))
    rows = selection_table(influence, [1024] * 10).splitlines()
    assert len(rows) == 4
    assert "3 skipped ( 30%): first  3, last  0" in rows[3]
    assert "saves 3.0 KiB" in rows[3]


@pytest.mark.parametrize(("num_blocks", "length"), [(57, 14), (2, 1), (1, 1), (28, 7)])
def test_the_window_is_the_papers_scaled(num_blocks, length):
    assert window_length(num_blocks) == length


def test_cosine_distance_is_that_of_the_definition():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert cosine_distance(a, b) == pytest.approx(1 - 24 / 25, abs=1e-15)
    assert cosine_distance(a, 5 * a) == pytest.approx(0.0, abs=1e-15)
    assert cosine_distance(a, -a) == pytest.approx(2.0, abs=1e-15)
    assert cosine_distance(a, torch.zeros(1, 2)) == 1.0
    assert cosine_distance(torch.zeros(2), torch.zeros(2)) == 0.0


def test_a_changed_bit_in_a_remembered_measurement_is_found():
    """A change in one digit of a distance could select other blocks."""
    influence = TextInfluence(
        4, front={0: 0.0, 1: 0.25, 2: 0.5}, back={0: 0.0, 1: 0.125}, window={0: 0.75}, num_pictures=2
    )
    text = influence.to_json().encode()
    for place in range(len(text)):
        for bit in (1, 2, 4):
            changed = bytearray(text)
            changed[place] ^= bit
            try:
                read = TextInfluence.from_json(changed.decode())
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            assert read == influence, changed
    without = json.loads(text)
    del without["checksum"]
    assert TextInfluence.from_json(json.dumps(without)) == influence  # as older versions wrote it


# --- measuring ---------------------------------------------------------------------------------------------------


class Angles:
    """Two pictures, rotated by an angle for every masked block, so that all distances are known."""

    steps = 2 * 3

    def __init__(self, turn=0.1, breaks_at=None):
        self.turn, self.breaks_at, self.sampled = turn, breaks_at, []

    def embeddings(self, masked, on_step):
        if len(self.sampled) == self.breaks_at:
            raise KeyboardInterrupt
        self.sampled.append(masked)
        for _ in range(self.steps):
            on_step()
        angles = [self.turn * len(masked) * scale for scale in (1.0, 2.0)]
        return [torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64) for angle in angles]

    def distance(self, count):
        return sum(1.0 - math.cos(self.turn * count * scale) for scale in (1.0, 2.0))


def test_measuring_samples_the_plain_pictures_once_and_every_run_once():
    sampler, told, kept = Angles(), [], []
    influence = TextInfluence(8, num_pictures=2)
    found = measure(
        influence, sampler, 3,
        keep=lambda so_far: kept.append(len(so_far.front) + len(so_far.back) + len(so_far.window)),
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert found is influence
    assert sampler.sampled[0] == frozenset()
    assert len(set(sampler.sampled)) <= len(sampler.sampled) == 1 + 3 + 3 + 7  # windows of 2 of 8 blocks
    for count in (1, 2, 3):
        assert found.front[count] == pytest.approx(sampler.distance(count), abs=1e-12)
        assert found.back[count] == pytest.approx(sampler.distance(count), abs=1e-12)
    assert list(found.window.values()) == pytest.approx([sampler.distance(2)] * 7, abs=1e-12)
    assert told == [(done, 14 * 6) for done in range(1, 14 * 6 + 1)]
    assert kept == list(range(3, 16))  # after every distance; the two without masking are already known


def test_an_interrupted_measurement_continues_with_what_is_missing():
    whole, interrupted = TextInfluence(8), TextInfluence(8)
    measure(whole, Angles(), 2, with_window=False)
    with pytest.raises(KeyboardInterrupt):
        measure(interrupted, Angles(breaks_at=3), 2, with_window=False)
    again = Angles()
    assert measure(interrupted, again, 2, with_window=False) == whole
    assert len(again.sampled) == 1 + 2
    nothing = Angles()
    assert measure(interrupted, nothing, 2, with_window=False) == whole
    assert nothing.sampled == []

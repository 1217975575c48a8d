"""The loss curve: smoothing compared with its formula, thinning without losing ends or means."""

import json
import math

import pytest
from blockskip_pack.blockskip_core.reporting.loss_curve import LossCurve, merged_points


def losses_of(count):
    return [1.0 + math.sin(step) for step in range(count)]


def filled(losses, *, span=10.0, limit=2000):
    curve = LossCurve(span, limit)
    for step, loss in enumerate(losses, 1):
        curve.add(step, loss, 1e-4)
    return curve


def test_smoothed_is_the_exponential_mean_corrected_for_its_start():
    losses, decay = losses_of(30), 1.0 - 1.0 / 8.0
    points = filled(losses, span=8.0).points()
    for number, (_, _, smoothed, _) in enumerate(points, 1):
        weights = [decay ** (number - 1 - place) for place in range(number)]
        mean = sum(w * x for w, x in zip(weights, losses[:number], strict=True)) / sum(weights)
        assert smoothed == pytest.approx(mean, rel=1e-5)


def test_a_constant_loss_is_smoothed_to_itself():
    assert {point[2] for point in filled([0.25] * 50).points()} == {0.25}


def test_a_short_run_is_kept_as_it_is():
    losses = losses_of(99)
    points = filled(losses, limit=100).points()
    assert [point[0] for point in points] == list(range(1, 100))
    assert [point[1] for point in points] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("count", [100, 101, 399, 400, 12345])
def test_a_long_run_stays_within_the_limit_and_keeps_its_end_and_its_mean(count):
    curve = filled(losses_of(count), limit=100)
    points = curve.points()
    assert 50 <= len(points) <= 100
    assert curve.count == count
    assert points[-1][0] == count
    steps = [point[0] for point in points]
    assert steps == sorted(set(steps))
    sizes = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    mean = sum(size * point[1] for size, point in zip(sizes, points, strict=True)) / count
    assert mean == pytest.approx(sum(losses_of(count)) / count, rel=1e-4)


def test_fewer_points_can_be_asked_for():
    curve = filled(losses_of(1000))
    assert len(curve.points(64)) <= 64
    assert curve.points(64)[-1][0] == 1000
    assert len(curve.points(5000)) == 1000


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_nothing_that_json_cannot_say_comes_out(odd):
    curve = LossCurve(10.0)
    assert curve.add(1, odd, odd) == (1, None, None, None)
    curve.add(2, 0.5, 1e-4)
    curve.add(3, odd)
    assert curve.points()[1:] == [(2, 0.5, 0.5, 1e-4), (3, None, 0.5, None)]
    json.dumps(merged_points(curve.points(), 3), allow_nan=False)

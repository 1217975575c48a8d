"""The criterion: polynomials, other numbers of steps, the paper's form, and what a switch of patch size does to it."""

import math

import pytest
import torch
from blockskip_pack.blockskip_core.ddit.third_difference import (
    History,
    Point,
    divided_difference,
    extrapolated,
    literal,
    normalised,
    variation,
)

SHIFT = 3.0


def sigmas(steps, shift=SHIFT):
    """The noise levels of a shifted schedule, from 1 to 0."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * even / (1 + (shift - 1) * even)).tolist()


def picture(seed=0):
    return torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trajectory(function, steps):
    return [Point(sigma, function(sigma)) for sigma in sigmas(steps)]


def polynomial(degree):
    parts = [picture(power) for power in range(degree + 1)]
    return lambda sigma: sum(part * sigma**power for power, part in enumerate(parts))


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_it_is_zero_on_quadratics_and_constant_on_cubics_however_sampled(steps):
    points = trajectory(polynomial(2), steps)
    for end in range(4, steps + 1):
        torch.testing.assert_close(
            normalised(points[:end]), torch.zeros(1, 2, 8, 8, dtype=torch.float64), rtol=0, atol=1e-9
        )
    points = trajectory(polynomial(3), steps)
    expected = 6 * picture(3) / 50**3
    for end in range(4, steps + 1):
        torch.testing.assert_close(normalised(points[:end]), expected, rtol=1e-6, atol=1e-9)


def test_on_equal_steps_of_a_fiftieth_it_is_the_papers_number():
    points = [Point(k / 50, picture(k)) for k in range(4)]
    torch.testing.assert_close(normalised(points), literal(points))


def test_the_papers_form_is_the_difference_of_differences():
    a, b, c, d = (picture(k) for k in range(4))
    first, second, third = b - a, c - b, d - c
    expected = (third - second) - (second - first)
    torch.testing.assert_close(literal([Point(0.0, x) for x in (a, b, c, d)]), expected)
    torch.testing.assert_close(literal([Point(0.0, x) for x in (a, b, c, d)]), 2 * ((third + first) / 2 - second))


def test_the_papers_form_depends_on_the_number_of_steps_and_ours_does_not():
    def smooth(sigma):
        return picture() * math.sin(3 * sigma)

    ours, papers = {}, {}
    for steps in (50, 100):
        points = [point for point in trajectory(smooth, steps) if point.sigma >= sigmas(steps)[steps // 2] - 1e-12]
        ours[steps] = normalised(points).std().item()
        papers[steps] = literal(points).std().item()
    assert ours[50] == pytest.approx(ours[100], rel=0.05)
    assert papers[50] / papers[100] == pytest.approx(8.0, rel=0.2)  # the cube of the step


def test_extrapolation_is_exact_on_a_polynomial():
    points = trajectory(polynomial(3), 9)
    torch.testing.assert_close(extrapolated(points[2:6], points[6].sigma), points[6].value)
    torch.testing.assert_close(divided_difference(points[:1]), points[0].value)


def test_variation_against_brute_force():
    difference = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for rho in (0.0, 0.4, 0.7, 1.0):
        for number, found in enumerate(variation(difference, 4, rho)):
            deviations = []
            for row in range(0, 8, 4):
                for column in range(0, 12, 4):
                    values = difference[number, :, row : row + 4, column : column + 4].flatten().tolist()
                    mean = sum(values) / len(values)
                    deviations.append(math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)))
            deviations.sort()
            place = rho * (len(deviations) - 1)
            low = math.floor(place)
            high = min(low + 1, len(deviations) - 1)
            expected = deviations[low] + (place - low) * (deviations[high] - deviations[low])
            assert found.item() == pytest.approx(expected)


def test_the_patches_of_a_clip_are_those_of_its_frames():
    """Frames are among the channels; here they are laid out side by side."""
    clip = torch.randn(2, 3, 4, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    side_by_side = torch.cat(clip.unbind(2), -1)
    torch.testing.assert_close(variation(clip.flatten(1, 2), 4, 0.4, 4), variation(side_by_side, 4, 0.4))


@pytest.mark.parametrize("steps", [20, 50])
def test_a_switch_to_patches_with_a_constant_error_of_their_own_is_not_seen(steps):
    """On a cubic every value stays the same, before, at and after the switches."""
    function, history = polynomial(3), History()
    for step, sigma in enumerate(sigmas(steps)):
        scale = 2 if steps // 3 <= step < 2 * steps // 3 else 1
        history.add(sigma, function(sigma) + (picture(99) if scale == 2 else 0.0), scale)
        if history.is_complete:
            torch.testing.assert_close(normalised(history.points), 6 * picture(3) / 50**3, rtol=1e-5, atol=1e-8)


def test_an_uncorrected_switch_would_be_seen():
    values = [polynomial(2)(sigma) + (picture(99) if step > 4 else 0.0) for step, sigma in enumerate(sigmas(20)[:6])]
    points = [Point(sigma, value) for sigma, value in zip(sigmas(20), values, strict=False)]
    assert normalised(points).std() > 0.01


def test_the_same_noise_level_again_replaces_the_last_point():
    history = History()
    for sigma in (1.0, 0.9, 0.9, 0.8):
        history.add(sigma, picture(), 1)
    assert [point.sigma for point in history.points] == [1.0, 0.9, 0.8]
    assert not history.is_complete

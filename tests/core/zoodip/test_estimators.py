"""Gradients without backward passes, in float64 on functions whose gradients are known."""

import pytest
import torch
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.zoodip.directions import directions
from blockskip_pack.blockskip_core.zoodip.estimators import ESTIMATORS, estimator, published_divisor

NUMBERS = 7


@pytest.fixture
def quadratic():
    """L(x) = x A x / 2 + b x at a point, with its gradient there."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(NUMBERS, NUMBERS, generator=generator, dtype=torch.float64)
    a, b = root @ root.T, torch.randn(NUMBERS, generator=generator, dtype=torch.float64)
    point = torch.randn(NUMBERS, generator=generator, dtype=torch.float64)
    return lambda x: 0.5 * ((x @ a) * x).sum(-1) + x @ b, point, point @ a + b, a


def drawn(count, seed=3):
    return directions(seed, 0, count, NUMBERS).double()


def estimate(name, loss, point, e, mu):
    found = estimator(name)
    points = found.points(point, mu * e)
    assert len(points) == found.passes(len(e))
    return found.gradient(loss(points), e, mu)


@pytest.mark.parametrize("mu", [1e-3, 1.0, 30.0])
def test_central_differences_are_exact_on_quadratics(quadratic, mu):
    loss, point, gradient, _ = quadratic
    e = drawn(4)
    torch.testing.assert_close(estimate("central", loss, point, e, mu), (e @ gradient) @ e / 4, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["leave-one-out", "forward difference"])
def test_the_others_differ_from_it_by_a_term_proportional_to_mu(quadratic, name):
    loss, point, gradient, a = quadratic
    e = drawn(5)
    curvature = 0.5 * ((e @ a) * e).sum(1)
    if name == "leave-one-out":
        limit = torch.stack(
            [(e @ gradient)[i] - (e @ gradient)[[j for j in range(5) if j != i]].mean() for i in range(5)]
        )
        curvature = torch.stack([curvature[i] - curvature[[j for j in range(5) if j != i]].mean() for i in range(5)])
    else:
        limit = e @ gradient
    for mu in (1e-2, 1.0):
        torch.testing.assert_close(estimate(name, loss, point, e, mu), (limit + mu * curvature) @ e / 5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_over_many_directions_is_the_gradient(quadratic, name):
    """Unbiased on a quadratic: the term proportional to mu is even in e, and e is symmetric."""
    loss, point, gradient, _ = quadratic
    mu, steps, n = 0.1, 4000, 16
    e = drawn(steps * n, seed=5).view(steps, n, NUMBERS)
    rows = torch.stack([estimate(name, loss, point, e[i], mu) for i in range(steps)])
    error = rows.mean(0) - gradient
    assert (error.abs() < 5 * rows.std(0) / steps**0.5).all()
    assert error.norm() < 0.1 * gradient.norm()


def test_the_bias_on_a_cubic_falls_with_the_square_of_mu():
    """E[est] = g + mu^2 (d^3 L term): x^3 has expectation 3 x^2 + 3 mu^2, from E e^4 = 3."""
    e = directions(1, 0, 400_000, 1).double()
    point = torch.tensor([2.0], dtype=torch.float64)
    for mu in (0.5, 1.0):
        found = estimate("central", lambda x: x[:, 0] ** 3, point, e, mu)
        assert found.item() == pytest.approx(12.0 + 3.0 * mu**2, rel=0.02)


@pytest.mark.parametrize(("name", "passes"), [("leave-one-out", 8), ("forward difference", 9), ("central", 16)])
def test_the_passes_of_a_step_are_counted(name, passes):
    assert estimator(name).passes(8) == passes


def test_a_constant_added_to_all_losses_changes_nothing(quadratic):
    loss, point, _, _ = quadratic
    e = drawn(4)
    for name in ESTIMATORS:
        plain = estimate(name, loss, point, e, 0.5)
        torch.testing.assert_close(estimate(name, lambda x: loss(x) + 1000.0, point, e, 0.5), plain)


def test_a_perturbed_word_is_one_rounding_away_from_the_float32_word():
    """In half precision, most of a perturbation of 1e-3 would be lost."""
    word = 0.014 * torch.randn(768, generator=torch.Generator().manual_seed(1))
    steps = 1e-3 * directions(0, 0, 2, 768)
    points = estimator("central").points(word, steps)
    exact = torch.cat([word.double() + steps.double(), word.double() - steps.double()])
    assert (points.double() - exact).abs().max() <= torch.finfo(torch.float32).eps * 0.06
    in_half = (word.bfloat16() + steps.bfloat16()).double()
    assert (in_half - exact[:2]).abs().max() > 100 * (points.double() - exact).abs().max()


def test_the_published_divisor_is_the_length_of_an_estimate():
    gradient = torch.zeros(50, dtype=torch.float64)
    gradient[0] = 1.0
    lengths = []
    for step in range(4000):
        e = directions(2, step, 3, 50).double()
        lengths.append(((e @ gradient) @ e / 3).square().sum())
    # E |g_hat|^2 = (d + n + 1) / n for a unit gradient; the paper's code has d + n - 1
    assert torch.stack(lengths).mean().sqrt().item() == pytest.approx(published_divisor(50, 3), rel=0.03)


def test_directions_depend_on_seed_and_step_alone():
    state = torch.get_rng_state()
    first = directions(7, 3, 2, 5)
    assert torch.equal(first, directions(7, 3, 2, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, directions(7, 4, 2, 5))
    assert not torch.equal(first, directions(8, 3, 2, 5))


def test_an_unknown_estimator_is_refused():
    with pytest.raises(InvalidInputError, match="must be one of leave-one-out, forward difference, central"):
        estimator("newton")

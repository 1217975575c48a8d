"""The regression by a diagonal plus a low rank: planted maps, closed forms, and what it minimises."""

import pytest
import torch
from blockskip_pack.blockskip_core.residuals.low_rank_regression import (
    Moments,
    diagonal_low_rank_regression,
    ridge_regression,
)

WIDTH = 24


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(rank, width=WIDTH):
    return torch.diag(normal(width, seed=1)) + normal(width, rank, seed=2) @ normal(rank, width, seed=3)


def tokens(count=600, width=WIDTH, shift=0.0):
    return normal(count, width, seed=4) @ normal(width, width, seed=5) + shift


def moments_of(h, d, parts=3):
    moments = Moments(h[: len(h) // parts], d[: len(d) // parts])
    for some_h, some_d in zip(h.chunk(parts), d.chunk(parts), strict=True):
        moments.add(some_h, some_d)
    return moments


def dense(found):
    return torch.diag(found.diagonal) + found.down @ found.up


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_a_planted_diagonal_plus_low_rank_is_found_exactly(rank, shift):
    wanted, h = planted(rank), tokens(shift=shift)
    found = diagonal_low_rank_regression(moments_of(h, h @ wanted + 7.0), rank, ridge=0.0)
    assert found.up.shape == (rank, WIDTH)
    torch.testing.assert_close(dense(found), wanted, rtol=0, atol=1e-6 if shift else 1e-9)


def lstsq(h, d, ridge):
    """Ridge regression as least squares with extra rows."""
    centred = h - h.mean(0)
    penalty = ridge * centred.square().mean(0).mean() * len(h)
    rows = torch.cat([centred, penalty.sqrt() * torch.eye(WIDTH, dtype=h.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([d - d.mean(0), torch.zeros(WIDTH, d.shape[1], dtype=h.dtype)])).solution


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [WIDTH, 100])
def test_of_full_rank_it_is_closed_form_least_squares(ridge, rank):
    h, d = tokens(), normal(600, WIDTH, seed=6)
    found = diagonal_low_rank_regression(moments_of(h, d), rank, ridge)
    torch.testing.assert_close(dense(found), lstsq(h, d, ridge), rtol=0, atol=1e-10)
    torch.testing.assert_close(ridge_regression(moments_of(h, d), ridge), lstsq(h, d, ridge), rtol=0, atol=1e-10)


def ridge_loss(h, d, ridge, answer):
    centred = h - h.mean(0)
    penalty = ridge * centred.square().mean(0).mean() * len(h)
    return ((d - d.mean(0) - centred @ answer).square().sum() + penalty * answer.square().sum()).item()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_is_no_worse_than_the_best_rank_and_than_the_best_diagonal(rank):
    h, ridge = tokens(), 0.05
    d = h @ planted(12) + normal(600, WIDTH, seed=6)
    covariance, crossed = moments_of(h, d).covariances(ridge)
    root = torch.linalg.cholesky(covariance, upper=True)
    u, s, v = torch.linalg.svd(torch.linalg.solve(root.T, crossed))
    best_rank = torch.linalg.solve(root, u[:, :rank] * s[:rank]) @ v[:rank]  # reduced-rank regression
    best_diagonal = torch.diag(crossed.diagonal() / covariance.diagonal())
    found = ridge_loss(h, d, ridge, dense(diagonal_low_rank_regression(moments_of(h, d), rank, ridge)))
    assert found < ridge_loss(h, d, ridge, best_rank)
    assert found < ridge_loss(h, d, ridge, best_diagonal)


def test_no_small_step_lowers_its_loss():
    h, ridge = tokens(), 0.05
    d = h @ planted(12) + normal(600, WIDTH, seed=6)
    found = diagonal_low_rank_regression(moments_of(h, d), 3, ridge)
    parts = [x.clone().requires_grad_() for x in (found.diagonal, found.down, found.up)]
    centred, targets = h - h.mean(0), d - d.mean(0)
    penalty = ridge * centred.square().mean(0).mean() * len(h)
    answer = torch.diag(parts[0]) + parts[1] @ parts[2]
    loss = (targets - centred @ answer).square().sum() + penalty * answer.square().sum()
    steps = torch.autograd.grad(loss, parts)
    for part, step in zip((found.diagonal, found.down, found.up), steps, strict=True):
        assert (step.norm() * part.norm()).item() < 0.05 * loss.item()


def test_it_is_the_same_every_time_and_leaves_the_global_generator_alone():
    h, state = tokens(), torch.random.get_rng_state()
    first, second = (diagonal_low_rank_regression(moments_of(h, h @ planted(2)), 3, 0.01) for _ in range(2))
    assert torch.equal(dense(first), dense(second))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_input_that_never_changes_gives_no_answer():
    h = torch.ones(50, WIDTH, dtype=torch.float64)
    assert dense(diagonal_low_rank_regression(moments_of(h, 3 * h), 2, 0.01)).abs().max() == 0.0


def test_sums_are_in_float64_whatever_the_tokens_are():
    h = tokens().float()
    d = h @ planted(2).float()
    covariance, crossed = moments_of(h, d, parts=1).covariances(0.0)
    assert covariance.dtype == crossed.dtype == torch.float64
    many = Moments(h, d)
    for _ in range(200):
        many.add(h, d)
    torch.testing.assert_close(many.covariances(0.0)[0], covariance, rtol=1e-12, atol=1e-12)

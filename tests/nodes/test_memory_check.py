"""The trainer counts before it starts, and refuses what cannot fit."""

from __future__ import annotations

import pytest


@pytest.fixture
def room(nodes, monkeypatch):
    """Set how much memory the device has free."""

    def set_free(free):
        monkeypatch.setattr(nodes.training_run, "room_on", lambda device: (free, "a small card"))

    return set_free


def said(trained):
    return trained.ui["blockskip"][0]


def test_with_plenty_nothing_is_counted(bench, nodes, monkeypatch):
    monkeypatch.setattr(nodes.training_run.CountedRun, "needs", lambda *_: pytest.fail("counted"))
    assert said(bench.train())["problems"] == []


def test_a_run_that_cannot_fit_is_not_started(bench, room):
    residuals = bench.precompute()[0]
    before = bench.folders.files()
    room(1000)
    with pytest.raises(
        ValueError,
        match=r"Training takes .* and a small card has 1000 B free\. It was not started\. No "
        r"change .* Or switch `check_memory` off to try it all the same\.",
    ):
        bench.train(residuals=residuals)
    assert bench.folders.files() == before


def test_what_would_make_it_fit_is_in_the_sentence(bench, nodes, room, monkeypatch):
    residuals = bench.precompute()[0]
    counted = []
    real = nodes.training_run.CountedRun.needs
    monkeypatch.setattr(
        nodes.training_run.CountedRun,
        "needs",
        lambda self, settings: counted.append(real(self, settings)) or counted[-1],
    )
    room(1)
    with pytest.raises(ValueError, match="not started"):
        bench.train(residuals=residuals, checkpointing=True)
    frugal = counted[0].training.peak - counted[0].training.weights
    room(round(frugal * 1.06))
    with pytest.raises(ValueError, match="It fits if you switch `checkpointing` on"):
        bench.train(residuals=residuals, checkpointing=False)


def test_the_check_can_be_overridden_and_then_warns(bench, room):
    room(1000)
    trained = bench.train(check_memory=False)
    (problem,) = said(trained)["problems"]
    assert problem.startswith("Training takes")
    assert said(trained)["steps"] == 3

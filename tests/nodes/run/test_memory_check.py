"""The trainer counts before it starts, and refuses runs that cannot fit."""

from __future__ import annotations

import pytest


@pytest.fixture
def room(core, monkeypatch):
    """Set the device's free memory."""

    def set_free(free):
        monkeypatch.setattr(core("hosts.runs.memory_check"), "room_on", lambda device: (free, "a small card"))

    return set_free


def said(trained):
    return trained.ui["blockskip"][0]


def test_with_plenty_nothing_is_counted(bench, core, monkeypatch):
    monkeypatch.setattr(core("hosts.runs.memory_check").CountedRun, "needs", lambda *_: pytest.fail("counted"))
    assert said(bench.train())["problems"] == []


def test_a_run_that_cannot_fit_is_not_started(bench, room):
    residuals = bench.precompute()[0]
    before = bench.folders.files()
    room(1000)
    with pytest.raises(
        ValueError,
        match=r"Training needs .* and a small card has 1000 B free\. It was not started\. No "
        r"change .* Or switch `check_memory` off to try anyway\.",
    ):
        bench.train(residuals=residuals)
    assert bench.folders.files() == before


def test_what_would_make_it_fit_is_in_the_sentence(bench, core, room, monkeypatch, pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("the bytes are those of a CPU, where weights are not counted")
    residuals = bench.precompute()[0]
    counted = []
    real = core("hosts.runs.memory_check").CountedRun.needs
    monkeypatch.setattr(
        core("hosts.runs.memory_check").CountedRun,
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
    assert problem.startswith("Training needs")
    assert said(trained)["steps"] == 3


def test_layers_that_cannot_be_counted_do_not_end_the_run(bench, core, room, monkeypatch):
    def broken(self, settings):
        raise AttributeError("no such shape")

    monkeypatch.setattr(core("hosts.runs.memory_check").CountedRun, "needs", broken)
    room(1000)
    trained = bench.train()
    (problem,) = said(trained)["problems"]
    assert problem == (
        "The memory of this run could not be counted (AttributeError: no such shape). It was started anyway."
    )


def test_cancel_while_memory_is_counted_ends_the_run(bench, core, room, monkeypatch):
    """Counting runs the host's layers, which raise it; in ComfyUI 0.18.2 it is an ordinary exception."""
    import comfy.model_management

    class OlderInterrupt(Exception):
        pass

    def cancelled(self, settings):
        raise OlderInterrupt

    monkeypatch.setattr(comfy.model_management, "InterruptProcessingException", OlderInterrupt)
    monkeypatch.setattr(core("hosts.runs.memory_check").CountedRun, "needs", cancelled)
    room(1000)
    with pytest.raises(OlderInterrupt):
        bench.train()


def test_a_finished_run_is_not_refused(bench, room):
    residuals = bench.precompute()[0]
    bench.train(residuals=residuals, resume=True)
    room(1000)
    assert said(bench.train(residuals=residuals, resume=True))["steps"] == 3


def test_models_that_are_gone_are_no_obstacle(bench, core, monkeypatch):
    import comfy.model_management

    class Gone:
        model, device = None, comfy.model_management.get_torch_device()

        def model_loaded_memory(self):
            raise AttributeError("'NoneType' object has no attribute 'loaded_size'")

    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [Gone()])
    free, name = core("hosts.runs.memory_check").room_on(comfy.model_management.get_torch_device())
    assert free > 0
    assert name


def test_advice_that_memory_plan_rules_says_so(bench, nodes, run_node, room):
    residuals = bench.precompute()[0]
    plan = {
        "patch_min": 32, "draws": 6, "storage": "disk", "rank": 4, "batch_size": 1, "checkpointing": True,
        "quantize_kept": "off", "activation_budget": 0.0, "card_memory": 0.0,
    }  # fmt: skip
    selection = bench.select()[0]
    planned = run_node(nodes.MemoryPlan, model=bench.model, positive=bench.prompt, selection=selection, **plan)
    room(1000)
    with pytest.raises(ValueError, match="Some of these are set on Memory Plan. Or switch `check_memory` off"):
        bench.train(residuals=residuals, memory_settings=planned.args[3])

"""The speed benchmark: every arm on a tiny model, failures reported as text, the report's arithmetic and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

LARGE, SMALL = 64, 32
SHARED = {"key": "k", "machine": "one machine", "versions": "one version", "shape": "tiny", "reason": "Why.",
          "large": LARGE, "small": SMALL, "steps": 1, "draws": 2}  # fmt: skip


@pytest.fixture
def small(bench: Callable[[str], ModuleType], tmp_path: Path) -> SimpleNamespace:
    """The benchmark's modules and a test bench with a tiny model."""
    modules = {name: bench(name) for name in ("speed", "speed_arms", "speed_model", "speed_report")}
    shape = modules["speed_model"].SHAPES["tiny"]
    lab = modules["speed_model"].Lab(shape, torch.float32, tmp_path, sizes=(LARGE, SMALL), draws=2, rank=2)
    return SimpleNamespace(**modules, lab=lab, folder=tmp_path, file=tmp_path / "speed_cpu.jsonl")


def row(arm: str, number: int, seconds: list[float] | None = None, error: str | None = None, **more) -> dict:
    outcome = {"error": error} if error else {"seconds": seconds}
    return {**SHARED, "date": "2026-01-01 10:00", "part": "part", "size": LARGE, "unit": "step", "arm": arm,
            "round": number, **more, **outcome}  # fmt: skip


@pytest.mark.slow
def test_every_arm_gives_seconds_or_a_reason_and_a_stopped_run_goes_on(small, comfyui) -> None:
    arms = [arm for arm in small.speed_arms.all_arms(LARGE, SMALL) if arm.part != small.speed_arms.TOGETHER]
    assert len({arm.name for arm in arms}) == len(arms)
    small.speed.measure(small.lab, arms[:3], 1, 1, SHARED, small.file)
    first = small.speed_report.rows(small.file)
    small.speed.measure(small.lab, arms, 1, 1, SHARED, small.file)
    found = small.speed_report.rows(small.file)
    assert found[:3] == first
    assert [r["arm"] for r in found] == [arm.name for arm in arms]
    failed = {r["arm"]: r["error"] for r in found if "error" in r}
    times = {arm.name: arm.times for arm in arms}
    assert all(len(r["seconds"]) == times[r["arm"]] and min(r["seconds"]) > 0 for r in found if "error" not in r)
    streamed = small.speed_arms.ours_name(0.0, LARGE, True, "weights streamed")
    assert failed.pop(streamed) == "This needs a GPU: on a CPU all weights are in its memory anyway."
    # Apart from those, only ComfyUI core's trainer may fail, and with its default settings it does not.
    core = [r["arm"] for r in found if r["part"] == small.speed_arms.CORE]
    assert set(failed) <= set(core) - {small.speed_arms.core_name(LARGE, "checkpointing")}
    assert not list(small.folder.glob("*-0.5"))  # residuals on disk are removed
    small.speed_report.write(small.file.with_suffix(""))
    assert {p.suffix for p in small.folder.glob("speed_cpu.*")} == {".jsonl", ".md", ".png"}
    text = small.file.with_suffix(".md").read_text("utf-8")
    for claim in small.speed_report.claims(LARGE, SMALL):
        assert claim.text in text
    for arm in arms:
        assert f"| {arm.name} | " in text


@pytest.mark.slow
def test_processes_of_their_own_give_seconds_per_example(small, comfyui) -> None:
    alone, several = [arm for arm in small.speed_arms.all_arms(LARGE, SMALL) if arm.part == small.speed_arms.TOGETHER]
    assert (alone.unit, several.unit) == ("example", "example")
    assert several.name == f"50% skipped, {SMALL} px, 2 micro-batches a step, 2 processes"
    seconds = several.run(small.lab, 2)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_a_failing_arm_is_told_in_one_sentence_and_not_tried_again(small, comfyui) -> None:
    calls = []

    def fails(lab, count):
        calls.append(count)
        raise RuntimeError("It cannot | be done. Hint: try\nsomething else.")

    arms = [small.speed_arms.Arm("part", "one", LARGE, fails)]
    small.speed.measure(small.lab, arms, 3, 1, SHARED, small.file)
    assert [r["error"] for r in small.speed_report.rows(small.file)] == ["It cannot / be done."]
    assert calls == [1]


def test_arms_take_turns_and_every_second_round_runs_backwards(small, comfyui) -> None:
    order = []
    arms = [
        small.speed_arms.Arm("part", name, LARGE, lambda lab, count, name=name: order.append(name) or [1.0])
        for name in "abc"
    ]
    small.speed.measure(small.lab, arms, 3, 1, SHARED, small.file)
    assert "".join(order) == "abccbaabc"


def test_no_round_is_begun_that_would_take_too_long(small, comfyui, monkeypatch) -> None:
    clock = [0.0]

    def takes_a_minute(lab, count):
        clock[0] += 60
        return [1.0]

    monkeypatch.setattr(small.speed.time, "monotonic", lambda: clock[0])
    arms = [small.speed_arms.Arm("part", name, LARGE, takes_a_minute) for name in "ab"]
    small.speed.measure(small.lab, arms, 9, 1, SHARED, small.file, minutes=5)
    assert [r["round"] for r in small.speed_report.rows(small.file)] == [0, 0, 1, 1]
    small.speed.measure(small.lab, arms, 9, 1, {**SHARED, "key": "another"}, small.file, minutes=0.1)
    assert [r["round"] for r in small.speed_report.rows(small.file)[4:]] == [0, 0]


def test_the_plain_lora_and_ours_at_no_skip_train_the_same_layers(small, comfyui) -> None:
    """Both must train exactly the same number of parameters; otherwise their times cannot be compared."""
    import peft

    sizes = {}
    inject, make = peft.inject_adapter_in_model, small.speed_arms.LoraAdapters

    def injected(config, model, *rest, **named):
        result = inject(config, model, *rest, **named)
        sizes.setdefault("plain", sum(p.numel() for p in model.parameters() if p.requires_grad))
        return result

    def made(*args, **named):
        adapters = make(*args, **named)
        sizes["ours"] = sum(p.numel() for p in adapters.parameters())
        return adapters

    small.lab.patcher  # noqa: B018
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "inject_adapter_in_model", injected)
        small.speed_arms.plain_steps(small.lab, 1, size=SMALL, checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small.speed_arms, "LoraAdapters", made)
        small.speed_arms.our_steps(small.lab, 1, size=SMALL, ratio=0.0, checkpointing=False)
    assert sizes["plain"] == sizes["ours"] > 0


def test_the_models_for_core_share_the_weights_and_nothing_else(small, comfyui) -> None:
    patcher = small.lab.patcher
    twin = patcher.cached_patcher_init[0](disable_dynamic=True)
    own = dict(patcher.model.diffusion_model.named_parameters())
    for name, parameter in twin.model.diffusion_model.named_parameters():
        assert parameter is not own[name]
        assert parameter.data_ptr() == own[name].data_ptr()
        assert not parameter.is_meta
    assert not {id(m) for m in twin.model.modules()} & {id(m) for m in patcher.model.modules()}


def test_ratios_are_taken_within_a_round(small) -> None:
    report = small.speed_report
    found = [row("a", 0, [4.0]), row("b", 0, [2.0]), row("b", 1, [10.0]), row("a", 1, [30.0, 10.0, 20.0]),
             row("a", 2, [9.0])]  # fmt: skip
    assert report.ratios(found, "a", "b") == [2.0, 2.0]
    assert report.by_round(found, "a") == {0: 4.0, 1: 20.0, 2: 9.0}
    assert report.spread([3.0, 1.0, 2.0], report.seconds) == "2 (1 to 3)"
    assert report.spread([1.25], report.seconds) == "1.25"


def test_targets_are_met_on_the_right_side_of_their_limit(small) -> None:
    report, arms = small.speed_report, small.speed_arms
    ours, core = arms.ours_name(0.5, SMALL, True), arms.core_name(LARGE, "checkpointing")
    disk = arms.ours_name(0.5, SMALL, True, "from disk")
    found = [row(core, 0, [8.0]), row(ours, 0, [2.0]), row(disk, 0, [2.2]),
             row(arms.core_name(LARGE, "no checkpointing"), 0, error="No.")]  # fmt: skip
    lines = report.targets(found)
    assert f"| 50% at {SMALL} px against core's trainer at {LARGE} px, checkpointing: times faster | at least 4 | "\
           "4.00 | yes |" in lines  # fmt: skip
    assert f"| a step with residuals from disk against memory, {SMALL} px: times as long | at most 1.05 | 1.10 | "\
           "**no** |" in lines  # fmt: skip
    assert any("not measured: Train LoRA, 64 px, no checkpointing failed" in line for line in lines)
    assert any("not measured: plain LoRA, 64 px, checkpointing was not run" in line for line in lines)


def test_only_rows_of_the_newest_key_are_reported(small) -> None:
    rows = [row("old", 0, [1.0], key="other"), row("new", 0, [1.0])]
    small.file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    small.speed_report.write(small.file.with_suffix(""))
    text = small.file.with_suffix(".md").read_text("utf-8")
    assert "| new | " in text
    assert "| old | " not in text

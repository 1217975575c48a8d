"""The memory benchmark: its arms on a tiny model, the relations between them, and the report's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

GIB = 2**30


@pytest.fixture
def tiny(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The arms, and a model in FLUX.1's format with width 256 and 2 + 4 blocks."""
    from blockskip_pack.blockskip_core.hosts.families import published_sizes

    arms = bench("memory_arms")
    size = published_sizes.PUBLISHED_SIZES["FLUX.1-dev"]
    small = {**size.config, "hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 4}
    sizes = {"FLUX.1-dev": published_sizes.PublishedSize(size.supported, small)}
    monkeypatch.setattr(published_sizes, "PUBLISHED_SIZES", sizes)
    return SimpleNamespace(arms=arms, subject=arms.Subject(arms.FLUX))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_nothing_skipped_it_does_the_work_of_a_plain_lora(tiny, checkpointing):
    ours = tiny.subject.ours(256, (0, 0), checkpointing, "bf16", "cached")
    plain = tiny.subject.plain(256, checkpointing)
    assert (ours.operations, ours.weights) == (plain.operations, plain.weights)


def test_skipping_takes_less_of_everything(tiny):
    whole, half = (tiny.subject.ours(256, spans, True, "bf16", "cached") for spans in ((0, 0), (2, 1)))
    assert half.weights < whole.weights
    assert half.saved < whole.saved
    assert half.operations < whole.operations
    assert half.peak < whole.peak
    folded = tiny.subject.ours(256, (2, 1), True, "bf16", "on the fly")
    assert folded.weights == whole.weights
    assert folded.operations > half.operations


def test_formats_differ_in_what_is_kept(tiny):
    kept = [tiny.subject.ours(256, (2, 1), True, weights, "cached") for weights in tiny.arms.FORMATS]
    bf16, fp8, int8, four = (count.weights for count in kept)
    assert four < fp8 < int8 < bf16
    assert fp8 > bf16 / 2  # stem, head, biases and norms are not quantised
    unpacked = [count.peak - count.weights for count in kept]
    assert unpacked[1] == unpacked[2] == unpacked[3] >= unpacked[0]


def test_cores_adapters_cost_more_and_leave_the_hosts_classes_alone(tiny):
    import comfy.ops

    plain = tiny.subject.plain(256, False)
    for bypass in (False, True):
        core = tiny.subject.core(256, False, bypass)
        assert core.weights == plain.weights
        assert core.saved > plain.saved
    assert comfy.ops.CastWeightBiasOp.weight_function == comfy.ops.CastWeightBiasOp.bias_function == []
    assert tiny.subject.plain(256, False) == plain  # the arms' models share nothing


def test_every_arm_has_a_key_of_its_own_and_a_stopped_run_goes_on(bench, tiny, tmp_path: Path):
    memory, counted = bench("memory"), []
    arms = tiny.arms.arms_of(tiny.subject)
    keys = {memory.key_of({**vars(arm), "weights_format": arm.weights}) for arm in arms}
    assert len(keys) == len(arms)

    def count(name):
        counted.append(name)
        if name == "bad":
            raise RuntimeError("it does not run\nat all")
        return tiny.arms.PhaseCount(weights=1, peak=2, operations=3, host=4)

    few = [
        tiny.arms.Arm(part="p", name=name, size=256, count=lambda name=name: count(name)) for name in ("good", "bad")
    ]
    file = tmp_path / "memory.jsonl"
    memory.run(few, file, "today")
    memory.run(few, file, "tomorrow")
    assert counted == ["good", "bad"]
    good, bad = memory.rows_in(file)
    assert (good["weights_format"], good["weights"], good["peak"], good["about"]) == ("bf16", 1, 2, "today")
    assert bad["failed"] == "it does not run"


def row(part, name, size=256, checkpointing=True, weights_format="bf16", source="", **numbers):
    given = {"weights": GIB, "peak": 2 * GIB, "between": GIB, "saved": 0, "operations": 10**12, "host": 0, **numbers}
    return {"part": part, "name": name, "size": size, "checkpointing": checkpointing, "source": source,
            "weights_format": weights_format, "skipped": [0, 0], "about": "today", **given}  # fmt: skip


def test_report_compares_aims_with_what_was_counted(bench, tmp_path: Path):
    report = bench("memory_report")
    rows = [
        row("plain LoRA (peft)", "all blocks", 512, False, operations=4 * 10**12, peak=30 * GIB),
        row("BlockSkip", "50% skipped", source="cached", peak=int(7.5 * GIB)),
        row("BlockSkip", "50% skipped", source="cached", checkpointing=False, operations=8 * 10**11),
        row("BlockSkip", "50% skipped", source="cached", weights_format="fp8", peak=5 * GIB),
        row("for real: small", "BlockSkip, half skipped"),
        row("for real: small", "BlockSkip, half skipped, counted without weights"),
    ]
    report.write(json.loads(json.dumps(rows)), tmp_path)
    text = (tmp_path / "memory.md").read_text("utf-8")
    assert "| peak device memory, bf16 | <= 8.0 GiB | 7.500 GiB, of which weights 1.000 | yes |" in text
    assert "| peak device memory, fp8 base resident | <= 4.4 GiB | 5.000 GiB, of which weights 1.000 | no |" in text
    assert "both without checkpointing | <= 0.25 | 0.200 | yes |" in text
    assert "precomputing, peak device memory" not in text  # nothing to compare with
    assert "In all 1 pairs" in text
    assert "No GPU was available" in text
    assert (tmp_path / "memory.png").is_file()
    rows[-1]["peak"] += 1
    assert "differ" in report.same(rows[-2:])


@pytest.mark.parametrize(("blocks", "tokens", "met"), [(1, 0.25, "yes"), (2, 0.25, "no"), (1, 1.25, "no")])
def test_precomputing_is_met_only_by_one_block_and_a_micro_batch(bench, blocks, tokens, met):
    report = bench("memory_report")
    others = GIB
    whole = others + 19 * report.DOUBLE_BLOCK + 38 * report.SINGLE_BLOCK
    weights = others + blocks * report.DOUBLE_BLOCK
    before = {"part": "before training", "checkpointing": False}
    rows = [
        row("BlockSkip", "50% skipped", source="cached", peak=2 * GIB, between=GIB),
        row(name="precomputing, 50% skipped", **before, weights=weights, peak=int(weights + tokens * GIB)),
        row(name="choosing blocks", size=512, **before, weights=whole, peak=whole + GIB),
    ]
    (line,) = (line for line in report.targets(rows) if line.startswith("| precomputing"))
    assert line.endswith(f"| {met} |")


def test_the_real_model_is_counted_the_same_without_weights(bench, monkeypatch):
    real = bench("memory_real")
    for name, value in {"WIDTH": 256, "HEADS": 2, "DOUBLE": 1, "SINGLE": 2, "TEXT_TOKENS": 8, "SIZE": 64}.items():
        monkeypatch.setattr(real, name, value)
    from blockskip_pack.blockskip_core.hosts.models import hosted_dit

    monkeypatch.setattr(hosted_dit, "_WITH_BACKWARD", ("attention_pytorch",))  # the kernel that the counts use
    lab = real.Lab()
    counts = [lab.ours((1, 1), True, weightless=weightless) for weightless in (False, True)]
    beside = counts[0].between - counts[1].between  # a fused optimiser keeps step counters on the device, 4 bytes each
    assert 0 < beside < 1024
    assert counts[0].peak - beside == counts[1].peak > counts[0].weights
    assert counts[0].saved == counts[1].saved
    core = lab.core(True, True)
    assert core.weights == lab.weights
    assert core.operations > 0
    assert not any(torch.is_inference(parameter) for parameter in lab.patcher.model.parameters())


def test_a_card_gets_the_best_way_that_fits_it(bench):
    """Each way's peak, with the margin, is just what one card leaves; nothing fits 6 GB."""
    found = bench("memory_choices")
    from blockskip_pack.blockskip_core.accounting.plan import CARDS, MARGIN, room_of_card

    ways = dict(zip(("24 GB", "16 GB", "12 GB", "8 GB"), (*found.CHOICES[:3], found.CHOICES[4]), strict=True))
    peaks = {way: int(room_of_card(card) / (1.0 + MARGIN)) for card, way in ways.items()}
    peaks[found.CHOICES[3]] = 2**40
    rows = [
        {"part": part, "name": way.names[0], "size": 256, "weights_format": way.weights, "source": "cached", "checkpointing": True, "peak": peak}
        for part in ("Some-Model", "Half-Counted")
        for way, peak in peaks.items()
        if part == "Some-Model" or way is found.CHOICES[0]
    ]  # fmt: skip
    (line,) = [line for line in found.choices(rows) if line.startswith("| Some") or line.startswith("| Half")]
    labels = [cell.rsplit(": ", 1)[0] for cell in line.strip("| ").split(" | ")[1:]]
    expected = {"6 GB": "streamed", **{card: way.label for card, way in ways.items()}}
    assert dict(zip(CARDS, labels, strict=True)) == expected

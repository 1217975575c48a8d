"""The plan in sentences."""

from dataclasses import replace

import pytest
from blockskip_pack.blockskip_core.accounting.memory_needs import MemoryNeeds
from blockskip_pack.blockskip_core.accounting.phase_counts import PhaseCount
from blockskip_pack.blockskip_core.accounting.plan import changes_that_fit

from ..core.accounting.test_plan import BIG, GIB, needs, phase, price


@pytest.fixture
def report(core):
    return core("hosts.runs.plan_text").report


@pytest.fixture
def advice(core):
    return core("hosts.runs.plan_text").advice


def test_the_report_says_all(report):
    whole = needs(8 * GIB, selecting=22 * GIB, precomputing=GIB, weights=7 * GIB, host=GIB // 2, disk=2 * GIB)
    text = report(BIG, whole, 10 * GIB, "a card", (BIG, whole))
    assert text.startswith("Needs 8.00 GiB as set, you have 10.00 GiB (a card): fits.\n")
    for line in (
        "choosing blocks: 22.00 GiB on the device, only with method attention mask",
        "precomputing: 1.00 GiB on the device",
        "training: 8.00 GiB on the device, of which weights 7.00 GiB",
        "host memory besides the model: up to 512.0 MiB",
        "disk: 2.00 GiB of residuals",
    ):
        assert line in text.splitlines()
    assert "only with" not in report(replace(BIG, measured=True), whole, 10 * GIB, "a card", None)
    assert "disk: no residuals" in report(BIG, needs(1), 10 * GIB, "a card", None)


def applied(settings, found):
    """The settings with the changes that were found, and what they need, as the node hands them on."""
    for change in found[0]:
        settings = change.apply(settings)
    return settings, found[1]


def test_the_verdict_says_what_the_run_will_use(report):
    run = applied(BIG, changes_that_fit(BIG, 8 * GIB, price))
    assert report(BIG, price(BIG), 8 * GIB, "a card", run).splitlines()[0] == (
        "Needs 34.00 GiB as set, you have 8.00 GiB (a card). With `settings` connected, this run uses patch_min 256, "
        "storage chunked, batch_size 1, accumulation times 8, checkpointing on, quantize_kept int8: 7.00 GiB, fits."
    )


def test_the_verdict_says_that_spare_memory_is_used(report):
    run = replace(BIG, config=replace(BIG.config, checkpointing=True))
    assert (
        report(run, price(run), 99 * GIB, "a card", (BIG, price(BIG)))
        .splitlines()[0]
        .endswith(": fits. With `settings` connected, this run uses checkpointing off: 34.00 GiB, fits and is faster.")
    )


def test_the_verdict_says_if_nothing_helps(report):
    none = report(BIG, price(BIG), GIB, "a card", None)
    assert "No change of settings makes it fit. Skip more blocks" in none
    assert "Or set `kept_weights` to streamed" in none


def test_advice_is_a_sentence(advice):
    assert advice(changes_that_fit(BIG, 30 * GIB, price)) == "It fits if you switch `checkpointing` on."
    assert advice(None).startswith("No change of settings makes it fit.")


def test_work_is_counted_and_timed_where_the_device_is_here(report):
    whole = MemoryNeeds(
        selecting=phase(1), precomputing=PhaseCount(weights=0, peak=1, operations=2 * 10**12, host=0),
        training=PhaseCount(weights=0, peak=1, operations=5 * 10**12, host=0), lora=0, replayed=0, host=0, disk=0,
    )  # fmt: skip
    text = report(BIG, whole, GIB, "a card", None, draws=400, speed=10.0 * 10**12)
    assert (
        "work: a training step 5 TFLOP, precomputing 400 training examples 800 TFLOP. At least: a training step 0.5 s, "
        "precomputing 400 training examples 80 s, at the 10 TFLOP/s of this device's matrix products."
    ) in text.splitlines()
    text = report(BIG, whole, GIB, "a card", None, draws=40_000, speed=10.0 * 10**12)
    assert "precomputing 40,000 training examples 133 min" in text
    assert "on another card is not known." in report(BIG, whole, GIB, "a card", None)

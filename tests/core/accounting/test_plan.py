"""Whether a run fits and what to change, on given counts."""

from dataclasses import replace

import pytest
from blockskip_pack.blockskip_core.accounting.memory_needs import MemoryNeeds
from blockskip_pack.blockskip_core.accounting.phase_counts import PhaseCount
from blockskip_pack.blockskip_core.accounting.plan import (
    CARDS,
    CHANGES,
    MARGIN,
    MemorySettings,
    changes_that_fit,
    fits,
    peak_of,
    phase_peaks,
    room_of_card,
    verdict_on_training,
    with_spare_used,
)
from blockskip_pack.blockskip_core.training.config import TrainingConfig

GIB = 2**30
BIG = MemorySettings(
    config=TrainingConfig(steps=1, batch_size=4, accumulation=2, checkpointing=False, activation_budget=GIB),
    storage="on the fly",
    patch_min=512,
)


def phase(peak, weights=0):
    return PhaseCount(weights=weights, peak=peak, operations=0, host=0)


def needs(training, *, selecting=0, precomputing=None, weights=0, host=0, disk=0):
    return MemoryNeeds(
        selecting=phase(selecting), precomputing=None if precomputing is None else phase(precomputing),
        training=phase(training, weights), lora=0, replayed=0, host=host, disk=disk,
    )  # fmt: skip


def price(settings):
    """A made-up count: every costly setting has a price in GiB."""
    config = settings.config
    total = 1.0 * config.batch_size + 8.0 * (not config.checkpointing) + 2.0 * (settings.patch_min / 256)
    total += {"off": 8.0, "fp8": 4.0, "int8": 4.0, "4-bit": 2.0}[settings.quantize_kept]
    total += 10.0 * (settings.storage == "on the fly") + config.activation_budget / GIB * config.checkpointing
    return needs(round(total * GIB))


def test_a_peak_needs_a_margin():
    assert fits(100, 105)
    assert not fits(100, 104)
    assert MARGIN == 0.05


def test_the_worst_phase_that_must_fit_decides():
    assert peak_of(BIG, needs(5, selecting=99, precomputing=7)) == 7
    assert peak_of(BIG, needs(5, selecting=99)) == 5
    assert phase_peaks(needs(5, selecting=9)) == {"choosing blocks": 9, "training": 5}


@pytest.mark.parametrize(
    ("available", "texts"),
    [
        (30, ["checkpointing"]),  # 34 unchanged; 27 with checkpointing and its budget
        (26, ["storage"]),
        (22, ["checkpointing", "activation_budget", "batch_size"]),
    ],
)
def test_the_first_change_that_is_enough_is_taken(available, texts):
    assert price(BIG).training.peak == 34 * GIB
    found, then = changes_that_fit(BIG, round(available * GIB * 1.05), price)
    assert [change.text.split("`")[1] for change in found][: len(texts)] == texts
    assert fits(then.training.peak, round(available * GIB * 1.05))


def test_changes_add_up_until_it_fits():
    found, then = changes_that_fit(BIG, 8 * GIB, price)
    assert [change.text.split("`")[1] for change in found] == [
        "checkpointing", "activation_budget", "batch_size", "storage", "patch_min", "quantize_kept",
    ]  # fmt: skip
    assert then.training.peak == 7 * GIB


def test_what_cannot_fit_is_not_promised():
    assert changes_that_fit(BIG, GIB, price) is None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.text)
def test_a_change_asks_for_no_more_than_before_and_is_done_once(change):
    big = replace(BIG, frozen=3)
    changed = change.apply(big)
    assert changed is not big
    assert price(changed).training.peak <= price(big).training.peak + GIB  # the budget only counts with checkpointing
    assert change.apply(changed) is changed


def test_formats_that_the_host_lacks_are_not_proposed():
    assert changes_that_fit(BIG, 8 * GIB, price, ("off", "fp8", "4-bit"))[0][-1].text == "set `quantize_kept` to fp8"
    assert changes_that_fit(BIG, 8 * GIB, price, ("off",)) is None


def test_eight_bits_come_before_four_and_frozen_blocks_before_trained_ones():
    formats = [change.text.removeprefix("set ") for change in CHANGES if "quantize" in change.text]
    assert formats == [
        "`quantize_frozen` to int8", "`quantize_frozen` to fp8", "`quantize_kept` to int8", "`quantize_kept` to fp8",
        "`quantize_frozen` to 4-bit", "`quantize_kept` to 4-bit",
    ]  # fmt: skip


def test_frozen_blocks_are_quantised_only_where_there_are_any():
    change = next(change for change in CHANGES if change.text == "set `quantize_frozen` to 4-bit")
    assert change.apply(BIG) is BIG
    changed = change.apply(replace(BIG, frozen=3))
    assert (changed.quantize_frozen, changed.quantize_kept) == ("4-bit", "off")
    assert "quantize_frozen 4-bit" in changed.describe()
    assert "quantize_frozen" not in BIG.describe()


def test_a_change_that_saves_nothing_or_is_overwritten_is_not_named():
    """The blocks of a model in eight bits do not change with int8."""

    def eight_bits(settings):
        return needs(10 - 2 * (settings.quantize_frozen == "4-bit") - 3 * (settings.quantize_kept == "4-bit"))

    loaded = replace(BIG, config=TrainingConfig(steps=1), storage="disk", patch_min=256, frozen=3)
    found, _ = changes_that_fit(loaded, 6, eight_bits)
    assert [change.text for change in found] == ["set `quantize_frozen` to 4-bit", "set `quantize_kept` to 4-bit"]

    def sixteen_bits(settings):
        bits = {"off": 16, "fp8": 8, "int8": 8, "4-bit": 4}
        return needs(100 + 10 * bits[settings.quantize_frozen] + 10 * bits[settings.quantize_kept])

    found, then = changes_that_fit(loaded, 200, sixteen_bits)
    assert [change.text for change in found] == ["set `quantize_frozen` to 4-bit", "set `quantize_kept` to 4-bit"]
    assert then.training.peak == 180
    found, _ = changes_that_fit(replace(loaded, quantize_frozen="int8"), 280, sixteen_bits)
    assert [change.text for change in found] == ["set `quantize_kept` to int8"]


def test_nothing_is_counted_twice():
    asked = []
    changes_that_fit(BIG, 8 * GIB, lambda settings: asked.append(settings) or price(settings))
    assert len(asked) == len(set(asked))


def test_a_batch_of_one_keeps_the_examples_of_a_step():
    config = next(c for c in CHANGES if "batch_size" in c.text).apply(BIG).config
    assert (config.batch_size, config.accumulation) == (1, 8)


def test_a_finer_format_is_not_proposed_in_place_of_a_coarser_one():
    coarse = replace(BIG, quantize_kept="4-bit")
    assert all(change.apply(coarse).quantize_kept == "4-bit" for change in CHANGES)
    fp8 = replace(BIG, quantize_kept="fp8")
    assert {change.apply(fp8).quantize_kept for change in CHANGES} == {"fp8", "4-bit"}


def test_spare_memory_keeps_activations():
    small = replace(BIG, config=TrainingConfig(steps=1), storage="disk", patch_min=256)
    assert price(small).training.peak == 11 * GIB
    assert with_spare_used(small, round(11.2 * GIB), price) == small
    some = with_spare_used(small, 15 * GIB, price)  # 15 / 1.05 - 11 = 3.29
    assert (some.config.checkpointing, some.config.activation_budget) == (True, 3 * GIB)
    all_kept = with_spare_used(small, 20 * GIB, price)  # 19 without checkpointing
    assert (all_kept.config.checkpointing, all_kept.config.activation_budget) == (False, 0.0)
    assert with_spare_used(all_kept, 90 * GIB, price) is all_kept


def test_a_budget_that_costs_more_than_it_says_is_lowered():
    def dear(settings):
        more = settings.config.activation_budget if settings.config.checkpointing else 50 * GIB
        return needs(round(11 * GIB + 2 * more))

    small = replace(BIG, config=TrainingConfig(steps=1), storage="disk", patch_min=256)
    chosen = with_spare_used(small, 15 * GIB, dear)
    assert chosen.config.activation_budget == 1.5 * GIB
    assert fits(dear(chosen).training.peak, 15 * GIB)


def test_a_card_keeps_room_for_the_desktop():
    assert {card: room_of_card(card) / GIB for card in CARDS} == {
        "6 GB": 4.75, "8 GB": 6.5, "12 GB": 10.0, "16 GB": 13.5, "24 GB": 20.5,
    }  # fmt: skip


def test_a_training_starts_if_all_but_its_weights_fit():
    judged = verdict_on_training(10 * GIB, 8 * GIB, GIB, 11 * GIB, "the card")
    assert (judged.starts, judged.problem) == (True, "")
    judged = verdict_on_training(10 * GIB, 8 * GIB, GIB, 4 * GIB, "the card")
    assert judged.starts
    assert judged.problem == (
        "Training needs 10.00 GiB and the card has 4.00 GiB free, so weights are moved in every step, which is slow."
    )
    judged = verdict_on_training(10 * GIB, 8 * GIB, GIB, 3 * GIB, "the card")
    assert not judged.starts
    assert judged.problem.startswith("Training needs 3.00 GiB even without most of its weights, and the card has 3.00")


def test_settings_say_what_they_are():
    assert BIG.describe() == (
        "patch_min 512, storage on the fly, batch_size 4, accumulation times 2, checkpointing off, quantize_kept off."
    )
    kept = replace(BIG, config=TrainingConfig(steps=1, activation_budget=1.5 * GIB))
    assert "checkpointing on, activation_budget 1.5, quantize_kept off." in kept.describe()

"""Grouping of draws."""

from blockskip_pack.blockskip_core.data.micro_batches import MicroBatches, batches_of_equal_text


def test_a_run_longer_than_the_schedule_starts_over():
    run = MicroBatches(steps=3, batch_size=3)
    assert [run.draws_of(i, 4) for i in range(len(run))] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


def test_accumulated_micro_batches_are_counted_one_by_one():
    run = MicroBatches(steps=2, batch_size=2, accumulation=3)
    assert len(run) == 6
    assert [draw for number in range(len(run)) for draw in run.draws_of(number, 12)] == list(range(12))


def test_draws_of_equal_text_go_together_in_order_of_first_appearance():
    lengths = [5, 4, 5, 5, 4]
    assert batches_of_equal_text(range(5), lengths.__getitem__, 2) == [[0, 2], [3], [1, 4]]

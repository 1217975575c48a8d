"""Reading ahead: the same residuals in any order, and no thread or error is left behind."""

import threading
import time

import pytest
from blockskip_pack.blockskip_core.residuals.prefetch import prefetched


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("blockskip-prefetch")]


@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_every_draw_comes_once_and_in_order(ahead):
    read = []

    def slow(draw):
        read.append(draw)
        return f"residual {draw}"

    order = [3, 1, 1, 2, 0, 3]
    with prefetched(slow, order, ahead) as get:
        assert [get(draw) for draw in order] == [f"residual {draw}" for draw in order]
    assert read == order


def test_it_stays_ahead_but_no_further_than_asked():
    read = []
    with prefetched(lambda draw: read.append(draw) or draw, range(10), 3) as get:
        get(0)
        wait_until(lambda: len(read) == 4)
        time.sleep(0.05)
        assert read == [0, 1, 2, 3]


def test_a_draw_out_of_order_is_read_and_the_order_goes_on():
    read = []
    with prefetched(lambda draw: read.append(draw) or draw, range(5), 2) as get:
        assert get(4) == 4
        assert [get(draw) for draw in range(5)] == list(range(5))
    assert read.count(4) == 2


def test_draws_that_are_near_may_come_in_any_order_and_are_read_once():
    read = []
    with prefetched(lambda draw: read.append(draw) or draw, range(12), 4) as get:
        for draws in ((2, 0, 3, 1), (5, 4, 7, 6), (8, 9, 10, 11)):
            assert [get(draw) for draw in draws] == list(draws)
    assert sorted(read) == list(range(12))


def test_an_error_is_raised_where_the_draw_is_asked_for():
    def fails_at_two(draw):
        if draw == 2:
            raise OSError("damaged")
        return draw

    with prefetched(fails_at_two, range(4), 4) as get:
        assert get(0) == 0
        assert get(1) == 1
        with pytest.raises(OSError, match="damaged"):
            get(2)
        assert get(3) == 3


@pytest.mark.parametrize("problem", [None, RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_with_the_run_however_it_ends(problem):
    started = []

    def run():
        with prefetched(lambda draw: started.append(draw) or time.sleep(0.01), range(1000), 50) as get:
            get(0)
            assert threads()
            if problem:
                raise problem

    if problem:
        with pytest.raises(problem):
            run()
    else:
        run()
    assert not threads()
    assert len(started) < 60


def test_only_one_thread_reads_at_a_time():
    inside, most = [], []

    def read(draw):
        inside.append(draw)
        most.append(len(inside))
        time.sleep(0.002)
        inside.remove(draw)

    with prefetched(read, range(20), 8) as get:
        get(15)
        for draw in range(20):
            get(draw)
    assert max(most) == 1


def wait_until(holds):
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)

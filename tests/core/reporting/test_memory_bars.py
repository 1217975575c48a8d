"""The bars of Memory Plan: what is too much is red, what does not run is hatched, and nothing is wider than a node."""

from __future__ import annotations

from blockskip_pack.blockskip_core.reporting.memory_bars import TOO_MUCH, WIDTH, memory_bars
from blockskip_pack.blockskip_core.reporting.pictures import FAINT, KEPT

GIB = 2**30
AS_SET = {"choosing blocks": 22 * GIB, "precomputing": GIB, "training": 10 * GIB}
AS_RUN = {"choosing blocks": 22 * GIB, "precomputing": GIB, "training": 6 * GIB}


def areas(picture):
    """Return the number of pixels of each colour."""
    return {colour: count for count, colour in picture.getcolors(1 << 24)}


def test_only_what_runs_and_does_not_fit_is_red():
    picture = memory_bars(AS_SET, AS_RUN, ["choosing blocks"], 8 * GIB, 8 * GIB, "Needs 10 GiB.")
    assert picture.width == WIDTH
    found = areas(picture)
    red, blue = found[TOO_MUCH], found[KEPT]
    assert 1.1 < red / blue < 1.4  # one bar of 10 against bars of 1, 1 and 6
    measured = areas(memory_bars(AS_SET, AS_RUN, [], 8 * GIB, 8 * GIB, "Needs 10 GiB."))
    assert measured[TOO_MUCH] > 4 * red  # both bars of 22 too
    assert TOO_MUCH not in areas(memory_bars(AS_SET, None, ["choosing blocks"], 11 * GIB, 11 * GIB, "Fits."))


def test_the_bars_are_in_proportion():
    picture = memory_bars({"training": 4 * GIB}, None, [], 8 * GIB, 8 * GIB, "Fits.")
    row = [x for x in range(WIDTH) if any(picture.getpixel((x, y)) == KEPT for y in range(picture.height))]
    twice = memory_bars({"training": 8 * GIB}, None, [], 8 * GIB, 8 * GIB, "Fits.")
    longer = [x for x in range(WIDTH) if any(twice.getpixel((x, y)) == KEPT for y in range(twice.height))]
    assert abs(len(longer) - 2 * len(row)) <= 2


def test_what_needs_a_part_of_the_margin_is_red_and_the_margin_is_shaded():
    def drawn(largest):
        return areas(memory_bars({"training": 7 * GIB}, None, [], 8 * GIB, largest, "Needs 7 GiB."))

    assert drawn(7 * GIB)[KEPT] == drawn(6 * GIB)[TOO_MUCH]
    assert TOO_MUCH not in drawn(7 * GIB)
    assert drawn(6 * GIB)[FAINT] > drawn(7 * GIB)[FAINT]
    assert FAINT not in drawn(8 * GIB)

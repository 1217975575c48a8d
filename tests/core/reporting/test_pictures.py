"""Drawings: everything is in the right place for any number of blocks or crops."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.reporting import pictures
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.selection.text_influence import TextInfluence

NAMES = [f"double_blocks.{index}" for index in range(2)] + [f"single_blocks.{index}" for index in range(4)]


def heatmap(front: int, back: int, influence: TextInfluence | None = None):
    selection = BlockSelection(
        front=front, back=back, num_blocks=6, family="plain", block_bytes=(10,) * 6, note="A note."
    )
    return pictures.selection_heatmap(selection, influence, NAMES)


def colours_of_blocks(picture) -> list[tuple[int, int, int]]:
    """The colour of each block along the row of blocks."""
    row = [picture.getpixel((x, 90)) for x in range(230, picture.width - 40)]
    cell = len(row) // 6
    return [row[index * cell + cell // 2] for index in range(6)]


@pytest.mark.parametrize(("front", "back"), [(0, 0), (2, 1), (0, 5), (5, 0)])
def test_every_block_has_the_colour_of_its_span(front, back):
    expected = [pictures.FRONT] * front + [pictures.KEPT] * (6 - front - back) + [pictures.BACK] * back
    assert colours_of_blocks(heatmap(front, back)) == expected


def test_frozen_blocks_have_a_colour_of_their_own():
    frozen = BlockSelection(front=1, back=0, frozen=3, num_blocks=6)
    picture = pictures.selection_heatmap(frozen, None, NAMES)
    assert colours_of_blocks(picture) == [pictures.FRONT] + [pictures.KEPT] * 2 + [pictures.FROZEN] * 3


def test_a_measurement_adds_its_profiles():
    influence = TextInfluence(6)
    for run in influence.missing(3):
        influence.record(run, 0.1)
    assert heatmap(1, 1, influence).height > heatmap(1, 1).height


def test_distances_of_zero_can_be_drawn():
    influence = TextInfluence(6)
    for run in influence.missing(2):
        influence.record(run, 0.0)
    heatmap(1, 1, influence)


@pytest.mark.parametrize("num_blocks", [2, 57, 400])
def test_models_of_any_depth_can_be_drawn(num_blocks):
    selection = BlockSelection(front=1, back=0, num_blocks=num_blocks)
    picture = pictures.selection_heatmap(selection, None, [f"blocks.{index}" for index in range(num_blocks)])
    assert picture.width > num_blocks * 10


@pytest.mark.parametrize("count", [1, 7, 64, 65, 1000])
def test_long_lists_are_thinned_evenly_with_first_and_last(count):
    chosen = pictures.evenly(count)
    assert len(chosen) == min(count, 64)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, count - 1)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_crops_are_shown_in_order(count):
    crops = [torch.full((8, 8, 3), index / max(1, count - 1)) for index in range(count)]
    sheet = pictures.contact_sheet(crops, [str(index) for index in range(count)], cell=16)
    columns, last = min(8, count), count - 1
    place = (8 + last % columns * 24 + 8, 8 + last // columns * (16 + 22 + 8) + 8)
    assert sheet.getpixel((16, 16)) == (0, 0, 0)
    assert sheet.getpixel(place) == ((255, 255, 255) if count > 1 else (0, 0, 0))


def test_an_image_of_the_host_has_a_batch_axis_and_unit_range():
    image = pictures.as_image(heatmap(1, 1))
    assert image.shape[0] == 1
    assert image.shape[-1] == 3
    assert image.dtype == torch.float32
    assert 0.0 <= image.min() <= image.max() <= 1.0

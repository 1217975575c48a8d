"""The paper's selections, and scaled ones."""

import pytest
from blockskip_pack.blockskip_core.errors import InvalidInputError
from blockskip_pack.blockskip_core.selection.presets import preset_selection
from blockskip_pack.blockskip_core.selection.selection import num_skipped

from .test_selection import FLUX_BLOCKS


@pytest.mark.parametrize(("ratio", "chosen"), [(0.3, (7, 10)), (0.4, (13, 10)), (0.5, (19, 10))])
def test_the_presets_are_the_papers(ratio, chosen):
    preset = preset_selection(ratio, FLUX_BLOCKS, "flux")
    assert (preset.front, preset.back) == chosen
    assert preset.method == "preset"
    assert "paper's indices for FLUX.1 (DINO)" in preset.note


@pytest.mark.parametrize("family", ["chroma", "flux2", ""])
def test_another_family_with_as_many_blocks_is_not_said_to_be_the_papers(family):
    preset = preset_selection(0.5, FLUX_BLOCKS, family)
    assert (preset.front, preset.back) == (19, 10)
    assert "not measured on this model" in preset.note


def test_scaled_presets_are_valid_for_every_number_of_blocks_and_ratio():
    for num_blocks in range(2, 81):
        for step in range(91):
            ratio = step / 100
            try:
                budget = num_skipped(ratio, num_blocks)
            except InvalidInputError:
                continue
            preset = preset_selection(ratio, num_blocks, "flux")
            assert preset.front >= 0
            assert preset.back >= 0
            assert preset.front + preset.back == budget < num_blocks
            if (num_blocks, ratio) not in {(57, 0.3), (57, 0.4), (57, 0.5)}:
                assert "Scaled from" in preset.note

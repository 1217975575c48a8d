"""Which references belong to which picture, at which size they are shown, and which part of them."""

from __future__ import annotations

import pytest
import torch
from blockskip_pack.blockskip_core.data.patch_sampling import resize
from blockskip_pack.blockskip_core.data.reference_pictures import (
    AlignedReferences,
    ReferenceSettings,
    WholeReferences,
    references_per_picture,
    shown_size,
)
from blockskip_pack.blockskip_core.data.remarks import Labels
from blockskip_pack.blockskip_core.errors import InvalidInputError


@pytest.mark.parametrize(("references", "pictures", "each"), [(3, 3, 1), (6, 3, 2), (1, 1, 1), (2, 1, 2), (1, 3, 0)])
def test_references_are_distributed_evenly_or_one_is_for_all(references, pictures, each):
    assert references_per_picture(references, pictures) == each


@pytest.mark.parametrize(("references", "pictures"), [(2, 3), (4, 3), (0, 3), (5, 2)])
def test_any_other_number_is_refused(references, pictures):
    with pytest.raises(InvalidInputError, match=f"each of the {pictures} pictures, got {references} references"):
        references_per_picture(references, pictures)


def test_the_shorter_side_is_scaled_down_and_both_are_multiples():
    assert shown_size(1000, 2000, 512, 16) == (512, 1024)
    assert shown_size(1000, 1500, 512, 16) == (512, 768)
    assert shown_size(300, 200, 512, 16) == (304, 192)  # nothing is scaled up, apart from rounding
    assert shown_size(5, 300, 512, 16) == (16, 304)
    for height, width in ((777, 1234), (640, 480), (333, 2000)):
        rows, columns = shown_size(height, width, 512, 16)
        assert rows % 16 == columns % 16 == 0
        assert abs(rows / columns / (height / width) - 1.0) < 0.04


def test_whole_references_are_all_of_their_pictures():
    pictures = [torch.rand(32, 48, 3), torch.rand(100, 80, 3)]
    shown = WholeReferences(pictures, 48, 16)
    assert len(shown) == 2
    assert torch.equal(shown[0], pictures[0])
    assert torch.equal(shown[1], resize(pictures[1], 64, 48))


def test_aligned_references_have_the_size_of_their_pictures():
    references = [torch.rand(20, 30, 3), torch.rand(40, 40, 3), torch.rand(101, 150, 3)]
    labels = Labels(3, (), "Reference")
    aligned = AlignedReferences(references, [0, 2], [(40, 60), (100, 150)], labels)
    assert torch.equal(aligned[0], resize(references[0], 40, 60))
    assert aligned[1].shape == (100, 150, 3)  # within 2 %
    with pytest.raises(InvalidInputError, match="Reference 2 of 3 has 40 x 40 px and its picture 60 x 40 px"):
        AlignedReferences(references, [0, 1], [(40, 60), (40, 60)], labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 15}, "at least 16 px, got 15"), ({"part": "half"}, "one of whole, same part, got 'half'")],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        ReferenceSettings(**changes)

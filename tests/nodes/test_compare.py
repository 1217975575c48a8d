"""Compare Pictures as ComfyUI calls it: the files that the slider shows, and what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image


@pytest.fixture
def compare(nodes, run_node, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return lambda before, after: run_node(nodes.ComparePictures, before=before, after=after)


def test_both_pictures_are_kept_as_previews_under_their_sides(compare, tmp_path):
    shown = compare(torch.zeros(2, 8, 16, 3), torch.ones(2, 24, 16, 4)).ui
    assert set(shown) == {"blockskip_before", "blockskip_after"}  # "images" would be drawn by the host too
    for side, size, colour in (("before", (16, 8), 0), ("after", (16, 24), 255)):
        files = shown[f"blockskip_{side}"]
        assert len({file["filename"] for file in files}) == 2
        for file in files:
            assert (file["type"], file["subfolder"]) == ("temp", "")
            with Image.open(tmp_path / file["filename"]) as picture:
                assert (picture.size, picture.getpixel((0, 0))[0]) == (size, colour)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pictures_of_any_precision_are_compared(compare, tmp_path, dtype):
    shown = compare(torch.zeros(1, 8, 8, 3, dtype=dtype), torch.ones(1, 8, 8, 3)).ui
    with Image.open(tmp_path / shown["blockskip_before"][0]["filename"]) as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        (
            torch.zeros(2, 8, 8, 3),
            torch.zeros(3, 8, 8, 3),
            "`before` has 2 pictures and `after` has 3. Connect as many",
        ),
        (torch.zeros(0, 8, 8, 3), torch.zeros(1, 8, 8, 3), "No pictures came in. .* to `before`"),
        (torch.zeros(1, 8, 8, 3), torch.full((1, 8, 8, 3), torch.nan), "After 1 of 1 contains NaN or Inf"),
        (torch.zeros(1, 8, 8, 3), "a picture", "After 1 is not a picture but a str"),
        (torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8), r"After 1 must come in the shape"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(compare, tmp_path, before, after, match):
    with pytest.raises(ValueError, match=match):
        compare(before, after)
    assert not list(tmp_path.iterdir())

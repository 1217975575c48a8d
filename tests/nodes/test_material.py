"""Odd pictures and captions are reported on the node, on the contact sheet and in the summary; nothing is copied."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

BLANK = torch.ones(1, 64, 64, 3)


def picture(seed, side=64):
    return torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def said(nodes, monkeypatch):
    """The texts shown under the nodes."""
    found = []
    monkeypatch.setattr(nodes.precompute_residuals.NodeProgress, "say", lambda self, text: found.append(text))
    return found


def listed(bench, values):
    return type(bench.pictures)(values)


def test_a_blank_picture_is_named_on_the_node_and_in_the_summary(bench, said):
    residuals = bench.precompute(images=listed(bench, [picture(1), BLANK, picture(2)]))[0]
    sentence = "1 of 3 pictures is all of one colour, or almost: number 2 (white)."
    assert said[-1].startswith(sentence)
    assert said[-1].endswith("6 training examples from 3 pictures")
    trained = bench.train(residuals=residuals, output_name="loras/toy")
    (problem,) = trained.ui["blockskip"][0]["problems"]
    assert problem.startswith(sentence)
    page = ElementTree.fromstring((bench.folders.loras / "toy_00001_.html").read_text(encoding="utf-8"))
    assert [item.text for item in page.iter("li")] == [problem]


def test_a_blank_picture_is_marked_on_the_contact_sheet(bench, core):
    red = torch.tensor(core("reporting.pictures").TOO_MUCH) / 255
    sheet = bench.precompute(images=listed(bench, [picture(1), BLANK]))[1]
    clean = bench.precompute(images=listed(bench, [picture(1), picture(2)]))[1]
    marked = (sheet - red).abs().amax(-1) < 0.01
    assert sheet.shape == clean.shape
    assert marked.sum() > 3 * 160  # half of six crops are of the blank one
    assert ((clean - red).abs().amax(-1) < 0.01).sum() < 10


def test_captions_that_are_all_the_same_are_noticed(bench, said, prompt):
    pictures = listed(bench, [picture(seed) for seed in range(5)])
    bench.precompute(images=pictures, positive=listed(bench, [prompt] * 5))
    assert said[-1].startswith("All 5 captions are the same. If that is not on purpose, the texts are probably empty")
    bench.precompute(images=pictures, positive=prompt)  # one caption for all is not odd
    assert said[-1].startswith("6 training examples")


def test_a_caption_without_words_is_noticed(bench, said, prompt):
    import nodes as host

    bench.precompute(positive=host.ConditioningZeroOut().zero_out(prompt)[0])
    assert said[-1].startswith("1 of 1 captions is all zeros, as ConditioningZeroOut makes them: they hold no words.")


def test_the_file_is_named_of_a_picture_that_is_too_small(bench, core):
    file = core("hosts.inputs.material").TrainingFile
    images = listed(bench, [picture(seed) for seed in range(17)] + [torch.rand(1, 20, 30, 3)] + [picture(99)])
    with pytest.raises(
        ValueError, match=r"^1 of 19 pictures is smaller than the patch of 32 px: number 18 \(30 x 20 px\)"
    ):
        bench.precompute(images=images)
    files = listed(bench, [file(f"{index}.png", "x") for index in range(19)])
    with pytest.raises(
        ValueError, match=r"^1 of 19 pictures is smaller than the patch of 32 px: 17\.png \(30 x 20 px\)"
    ):
        bench.precompute(images=images, files=files)


@pytest.mark.parametrize("files", [["a.png", "b.png", "c.png"], [None], [{}]], ids=str)
def test_files_of_something_else_are_refused(bench, files):
    with pytest.raises(ValueError, match="`files` must come from Load Training Folder"):
        bench.precompute(files=listed(bench, files))


def test_files_of_another_folder_are_refused(bench, core):
    file = core("hosts.inputs.material").TrainingFile("a.png", "x")
    with pytest.raises(ValueError, match="`files` describes 1 pictures, and 3 came in. Connect"):
        bench.precompute(files=listed(bench, [file]))


@pytest.mark.parametrize(("form", "patch_max"), [(torch.float32, 32), (torch.bfloat16, 128)])
def test_however_many_pictures_come_in_a_few_are_held_beside_them(bench, core, form, patch_max):
    """Counted bytes of live tensors; whether pictures are resized, kept or converted, only one at a time."""
    side = 128

    def peak(count):
        images = listed(bench, [picture(seed, side).to(form) for seed in range(count)])
        with core("accounting.measuring").Counting() as counting:
            bench.precompute(images=images, patch_max=patch_max, draws=24, storage="on the fly")
        return counting.peak(torch.device("cpu"))

    assert peak(24) - peak(6) < 4 * side * side * 3 * 4

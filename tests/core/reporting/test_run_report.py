"""The summary of a run: correct, self-contained, safe with any names, and small however long the run was."""

from __future__ import annotations

import math
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import pytest
from blockskip_pack.blockskip_core.data.patch_sampling import PatchConfig
from blockskip_pack.blockskip_core.data.schedule import Draw, TrainingSchedule
from blockskip_pack.blockskip_core.errors import StorageError
from blockskip_pack.blockskip_core.reporting import markup, run_charts, run_report
from blockskip_pack.blockskip_core.reporting.run_report import (
    ReportSample,
    RunReport,
    figures,
    report_page,
    sample_of,
    write_report,
)
from blockskip_pack.blockskip_core.selection.selection import BlockSelection
from blockskip_pack.blockskip_core.training.config import TrainingConfig
from blockskip_pack.blockskip_core.training.result import TrainingResult
from PIL import Image

NAMES = [f"double_blocks.{index}" for index in range(2)] + [f"single_blocks.{index}" for index in range(4)]
SELECTION = BlockSelection(
    front=2, back=1, num_blocks=6, method="manual", block_bytes=(2**20,) * 6, note="By hand, for a test."
)
DRAWS = tuple(Draw(n % 3, 0, n / 8, 256 + 32 * n, 0, 0, n) for n in range(1, 8))
HOSTILE = "</title></style><script>alert('x')</script><img src=x onerror=\"y\">&amp;\x00\x1b\ud800\ufffe"


def made(losses=(0.5, 0.4, 0.3, 0.2), *, steps=None, planned=None, accumulation=1, result=None, **changes):
    """A report on an invented run."""
    steps = len(losses) // accumulation if steps is None else steps
    result = {"step_seconds": [0.5] * steps, "self_check": 5.6e-7, "saved_bytes": 3 * 2**19, **(result or {})}
    ordinary = {
        "file": "toy_00001_.safetensors",
        "file_bytes": 2**21,
        "family": "FLUX.1",
        "selection": SELECTION,
        "block_names": NAMES,
        "schedule": TrainingSchedule(DRAWS, PatchConfig(patch_min=256, patch_max=512), 77, "logit-normal"),
        "num_captions": 2,
        "storage": {"Residuals": "chunked", "Stored as": "int8"},
        "settings": {"learning_rate": 1e-4, "rank": 16, "checkpointing": True, "resume": False, "output_name": "loras/toy"},
        "config": TrainingConfig(steps=planned or max(1, steps), accumulation=accumulation),
        "result": TrainingResult(losses=list(losses), steps=steps, **result),
        "peak_bytes": 5 * 2**30 // 4,
        "peak_of": "process memory (RSS)",
        "kept_parameters": 2_670_000,
        "all_parameters": 4_360_000,
        "kept_bytes": 3 * 2**20,
        "all_bytes": 6 * 2**20,
        "lora_parameters": 12_345,
        "versions": {"BlockSkip": "0.1.0", "torch": "2.11.0"},
        "written": "2026-01-02 03:04+00:00",
    }  # fmt: skip
    return RunReport(**{**ordinary, **changes})


class Page(HTMLParser):
    """What a browser sees in a document."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, *pair) for pair in attrs)

    def handle_data(self, data):
        self.text += data


def rows(page):
    """Return name -> value of all rows of all tables."""
    tree = ElementTree.fromstring(page)
    return {row.find("th").text: row.find("td").text for row in tree.iter("tr")}


def paths(page, class_):
    """Return the points of every path of a class, one list of (x, y) per path."""
    tree = ElementTree.fromstring(page)
    found = [path.get("d") for path in tree.iter("path") if path.get("class").split()[0] == class_]
    return [[tuple(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", d)] for d in found]


def drawn_value(y, low, high, height=220):
    """Return the value at a height of the loss chart, whose range is that of the losses."""
    bottom, top = height - run_charts.BOTTOM, run_charts.TOP
    return low + (y - bottom) / (top - bottom) * (high - low)


RUNS = {
    "ordinary": made(),
    "one step": made([0.5]),
    "two equal": made([0.25, 0.25]),
    "constant": made([0.25] * 1000),
    "zero": made([0.0] * 5),
    "tiny": made([1e-300, 5e-324, 0.0]),
    "nearly equal": made([1.0, 1.0 + 1e-9]),
    "huge": made([1e38, 1e-38, 3e38]),
    "no seconds": made(result={"step_seconds": [], "resumed_at": 4, "self_check": None, "saved_bytes": 0}),
    "no step": made([], planned=5),
    "not finite": made([math.nan, 0.5, math.inf, 0.4]),
    "only nan": made([math.nan]),
    "accumulated": made([0.5] * 7, steps=2, planned=9, accumulation=3),
    "resumed": made([0.1 * n for n in range(1, 11)], result={"resumed_at": 4}),
    "no bytes": made(selection=replace(SELECTION, block_bytes=(), note="")),
    "problems": made(result={"problems": ["The disk is full.", "The disk is full.", "Another."]}),
    "long": made([0.3 + 0.1 * math.sin(n) for n in range(5000)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_gives_a_document_that_parses_and_holds_no_nan(name):
    page = report_page(RUNS[name])
    ElementTree.fromstring(page)  # well-formed
    shown = Page(page)
    assert shown.tags[:2] == ["html", "head"]
    numbers = " ".join(str(value) for tag, _, value in shown.attributes if tag != "meta")
    assert not re.search(r"\b(nan|inf)\b", (shown.text + numbers).lower())
    assert "e+" not in numbers  # coordinates are plain


@pytest.mark.parametrize("name", RUNS)
def test_all_that_is_drawn_lies_within_the_drawing(name):
    tree = ElementTree.fromstring(report_page(RUNS[name]))
    for drawing in tree.iter("svg"):
        width, height = map(float, drawing.get("viewBox").split()[2:])
        for shape in drawing.iter():
            xs = [float(shape.get(key)) for key in ("x", "x1", "x2") if shape.get(key)]
            ys = [float(shape.get(key)) for key in ("y", "y1", "y2") if shape.get(key)]
            for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", shape.get("d") or ""):
                xs, ys = [*xs, float(pair[0])], [*ys, float(pair[1])]
            assert all(0 <= x <= width for x in xs)
            assert all(0 <= y <= height for y in ys)


def test_the_document_fetches_nothing_and_runs_nothing():
    shown = Page(report_page(RUNS["problems"]))
    assert not {"script", "link", "img", "image", "iframe", "a", "object", "use", "base", "form"} & set(shown.tags)
    assert not [name for _, name, _ in shown.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in report_page(RUNS["problems"])
    assert "@import" not in report_page(RUNS["problems"])
    assert any("default-src 'none'" in str(value) for _, _, value in shown.attributes)


def test_samples_are_in_the_document_itself():
    pictures = [Image.new("RGB", (640, 320), (40 * place, 90, 200)) for place in range(3)]
    samples = [sample_of(picture, f"step {place}, {HOSTILE}") for place, picture in enumerate(pictures)]
    page = report_page(made(samples=samples))
    ElementTree.fromstring(page)
    shown = Page(page)
    sources = [value for tag, name, value in shown.attributes if (tag, name) == ("img", "src")]
    assert len(sources) == 3
    for source, sample, picture in zip(sources, samples, pictures, strict=True):
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64"
        assert b64decode(data) == sample.jpeg
        with Image.open(BytesIO(sample.jpeg)) as read:
            assert read.size == (320, 160)
            assert max(abs(a - b) for a, b in zip(read.getpixel((9, 9)), picture.getpixel((9, 9)), strict=True)) < 6
    assert "script" not in shown.tags
    assert "step 2, " in shown.text
    assert any("img-src data:" in str(value) for _, _, value in shown.attributes)


def test_of_very_many_samples_some_are_shown():
    samples = [ReportSample(f"step {place}", b"x") for place in range(200)]
    shown = Page(report_page(made(samples=samples)))
    assert shown.tags.count("img") == 48
    assert "step 0" in shown.text
    assert "step 199" in shown.text


def test_it_is_readable_on_a_phone_and_in_the_dark():
    page = report_page(made())
    assert "width=device-width" in page
    assert "prefers-color-scheme: dark" in page


def test_every_setting_and_version_appears():
    found = rows(report_page(made()))
    assert (found["learning_rate"], found["rank"], found["checkpointing"]) == ("0.0001", "16", "on")
    assert (found["resume"], found["output_name"]) == ("off", "loras/toy")
    assert (found["BlockSkip"], found["torch"], found["this summary was written"]) == (
        "0.1.0",
        "2.11.0",
        "2026-01-02 03:04+00:00",
    )


def test_the_numbers_are_right():
    losses = [1.0, 2.0] + [5.0] * 16 + [0.25, 0.75]
    found = rows(report_page(made(losses, planned=30, result={"step_seconds": [1.0, 2.0], "resumed_at": 18})))
    assert found["Steps"] == "20 of 30"
    assert found["Resumed at"] == "step 18"
    assert found["Time per step"] == "1.500 s on average, 0:00:03 in total (steps timed: 2)"
    assert found["Peak memory"] == "1.25 GiB (process memory (RSS))"
    assert found["Kept for the backward pass"].startswith("1.5 MiB ")
    assert found["Weights of the blocks that ran"] == "3.0 MiB of 6.0 MiB (2,670,000 of 4,360,000 parameters)"
    assert found["LoRA"] == "2.0 MiB on disk, 12,345 parameters"
    assert found["Loss, mean of the first and the last tenth"] == "1.5, 0.5"
    assert found["Self-check"].startswith("5.6e-07 ")
    assert found["Problems"] == "none"


def test_what_was_trained_is_said():
    found = rows(report_page(made([0.5] * 4, accumulation=2, planned=2)))
    assert found["Model family"] == "FLUX.1"
    assert found["Skipped"] == "the first 2 and the last 1 of 6"
    assert (found["Chosen by"], found["Note"]) == ("manual", "By hand, for a test.")
    assert found["Weights left out, as loaded"] == "3.0 MiB"
    assert (found["Pictures"], found["Captions"]) == ("3", "2")
    assert found["Training examples"] == "7, of which 4 were trained on"
    assert found["Patch sizes"] == "crops of 256 to 512 px, each resized to 256 px"
    assert (found["Noise levels drawn as"], found["Seed of the training examples"]) == ("logit-normal", "77")
    assert (found["Residuals"], found["Stored as"]) == ("chunked", "int8")


def test_a_span_in_front_of_trained_blocks_is_said():
    report = replace(made([0.5] * 4), selection=replace(SELECTION, front=1, tail=1))
    page = report_page(report)
    assert rows(page)["Skipped"] == "the first 1 and 1 in front of the last 1 of 6"
    assert "Blocks in order: 1 skipped, 3 trained, 1 skipped, 1 trained" in page
    assert "skipped near the end (1)" in page


def test_frozen_blocks_are_not_said_to_be_trained():
    page = report_page(replace(made([0.5] * 4), selection=replace(SELECTION, front=1, back=0, frozen=3)))
    assert "trained on 2 of 6 blocks" in page
    assert "Blocks in order: 1 skipped, 2 trained, 3 frozen" in page
    assert "run without adapters (3)" in page
    assert rows(page)["Skipped"] == "the first 1 of 6"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "trained on 3 of 6 blocks: 4 of 4 steps."),
        ({"planned": 9}, "4 of 9 steps (ended early)."),
        ({"result": {"resumed_at": 3}}, "4 of 4 steps, the first 3 by an earlier run."),
        ({"result": {"resumed_at": 4, "step_seconds": []}}, "4 of 4 steps, all by an earlier run."),
    ],
)
def test_the_headline_says_how_the_run_ended(changes, said):
    assert Page(report_page(made(**changes))).text.count(said) == 1


def test_what_is_not_known_is_said_and_not_made_up():
    found = figures(RUNS["no seconds"])
    assert found["Time per step"] == "no step was timed: an earlier run had made them all"
    assert found["Kept for the backward pass"] == "not counted in this run"
    assert found["Self-check"].startswith("not done")
    assert figures(RUNS["only nan"])["Loss, mean of the first and the last tenth"] == "no loss is known"


def test_problems_are_named_once_each():
    page = report_page(RUNS["problems"])
    assert Page(page).text.count("The disk is full.") == 1
    assert rows(page)["Problems"] == "2, see above"
    assert "<h2>Problems</h2>" not in report_page(made())


def test_hostile_text_stays_text_wherever_it_comes_in():
    hostile = made(
        file=HOSTILE,
        family=HOSTILE,
        block_names=[HOSTILE] * 6,
        selection=replace(SELECTION, note=HOSTILE, method=HOSTILE),
        schedule=replace(made().schedule, timesteps=HOSTILE),
        storage={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        peak_of=HOSTILE,
        written=HOSTILE,
        result={"problems": [HOSTILE]},
    )
    page = report_page(hostile)
    harmless = Page(report_page(RUNS["problems"])).tags
    assert set(Page(page).tags) <= set(harmless)
    assert not [name for _, name, _ in Page(page).attributes if name.startswith("on")]
    shown = HOSTILE[:-4] + "\ufffd" * 4
    texts = ["".join(part.itertext()) for part in ElementTree.fromstring(page).iter()]
    assert sum(shown in text for text in texts) > 10
    page.encode("utf-8")


def test_every_block_is_drawn_as_what_it_was():
    tree = ElementTree.fromstring(report_page(made()))
    rects = list(tree.iter("rect"))
    assert [rect.get("class") for rect in rects] == ["front"] * 2 + ["trained"] * 3 + ["back"]
    assert rects[0].find("title").text == "double_blocks.0: skipped at the front, 1.0 MiB"
    assert rects[2].find("title").text == "single_blocks.0: trained, 1.0 MiB"
    assert rects[5].find("title").text == "single_blocks.3: skipped near the end, 1.0 MiB"
    assert len({rect.get("height") for rect in rects}) == 2  # distinguishable without colours too
    labels = [text.text for text in next(tree.iter("svg")).iter("text")]
    labels += [text.text for text in tree.iter("text") if text.text not in labels]
    assert {"double blocks", "single blocks"} <= set(labels)


def running_means(losses, span):
    """The exponential mean up to each loss, written out: weights (1 - 1 / span)^age, normed."""
    means, above, below = [], 0.0, 0.0
    for loss in losses:
        above, below = above * (1 - 1 / span) + loss, below * (1 - 1 / span) + 1
        means.append(above / below)
    return means


def test_losses_stand_where_they_belong():
    losses = [0.5, 0.1, 0.4, 0.3, 0.9]
    page = report_page(made(losses))
    (raw,) = paths(page, "raw")
    assert [drawn_value(y, 0.1, 0.9) for _, y in raw] == pytest.approx(losses, abs=1e-3)
    gaps = [b[0] - a[0] for a, b in zip(raw, raw[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 4, abs=0.11)
    (smooth,) = paths(page, "smooth")
    means = running_means(losses, 10)
    assert [drawn_value(y, 0.1, 0.9) for _, y in smooth] == pytest.approx(means, abs=1e-3)


def test_axes_are_labelled_with_the_values_that_stand_there():
    drawing = ElementTree.fromstring(run_charts.loss_chart([0.5, 0.1, 0.4, 0.3, 0.9], 1))
    ends = [text for text in drawing.iter("text") if text.get("text-anchor") == "end"]
    assert [text.text for text in ends] == ["0.2", "0.4", "0.6", "0.8"]
    assert [drawn_value(float(text.get("y")) - 5, 0.1, 0.9) for text in ends] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8], abs=1e-3
    )
    assert [text.text for text in drawing.iter("text") if text.get("text-anchor") == "middle"] == list("12345")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.07, 0.31), (1e-7, 3e-7), (-5, 12_000), (2e7, 5e8), (1, 1.00001)])
def test_ticks_are_few_different_and_within_the_scale(low, high):
    ticks = run_charts._Scale(low, high, 0, 1).ticks()
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-6 * (high - low) <= value <= high + 1e-6 * (high - low) for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)
    spacing = ticks[1][0] - ticks[0][0]
    assert all(abs(float(label.replace(",", "")) - value) < 0.01 * spacing for value, label in ticks)


def test_several_forward_passes_make_one_step():
    drawing = ElementTree.fromstring(run_charts.loss_chart([0.5, 0.4, 0.3, 0.2] * 5, 4))
    labels = [text.text for text in drawing.iter("text") if text.get("text-anchor") == "middle"]
    assert labels == ["1", "2", "3", "4", "5"]


def test_where_the_run_went_on_is_marked():
    marks = ElementTree.fromstring(run_charts.loss_chart([0.1, 0.2, 0.3], 1, 2)).iter("line")
    marks = [line for line in marks if line.get("class") == "mark"]
    assert [float(line.get("x1")) for line in marks] == [(run_charts.LEFT + run_charts.WIDTH - run_charts.RIGHT) / 2]
    assert "resumed at step 2" in "".join(marks[0].itertext())
    assert 'class="mark"' not in run_charts.loss_chart([0.1, 0.2, 0.3], 1)


def test_one_loss_is_a_dot_in_the_middle():
    ((dot,),) = [points for points in paths(report_page(made([0.5])), "dots") if points[0][1] < 150][:1]
    assert dot[0] == (run_charts.LEFT + run_charts.WIDTH - run_charts.RIGHT) / 2


def test_crops_stand_at_their_noise_level_and_side():
    page = run_charts.crop_chart(DRAWS)
    (dots,) = paths(f"<g>{page}</g>", "dots")
    across = run_charts.WIDTH - run_charts.RIGHT - run_charts.LEFT
    assert [(x - run_charts.LEFT) / across for x, _ in dots] == pytest.approx([d.sigma for d in DRAWS], abs=1e-3)
    sides = [drawn_value(y, 288, 480, 160) for _, y in dots]
    assert sides == pytest.approx([d.side for d in DRAWS], abs=0.2)


def test_only_crops_that_were_trained_on_are_drawn():
    assert len(paths(report_page(made([0.5, 0.4])), "dots")[0]) == 2


@pytest.mark.parametrize("count", [401, 5000, 100_000])
def test_a_long_run_is_thinned_out_and_keeps_its_extremes(count):
    losses = [0.3 + 0.1 * math.sin(n * 0.7) for n in range(count)]
    losses[count // 2], losses[count // 3] = 0.95, 0.05
    schedule = replace(made().schedule, draws=DRAWS * (count // 7))
    page = report_page(made(losses, schedule=schedule))
    assert len(page.encode()) < 60_000  # bytes; one line of text per loss would take several times as much
    (smooth,) = paths(page, "smooth")
    assert len(smooth) == run_charts.MAX_SMOOTH
    raw = next(p.get("d") for p in ElementTree.fromstring(page).iter("path") if p.get("class") == "raw")
    assert raw.count("V") == run_charts.MAX_RAW
    heights = [float(y) for y in re.findall(r"V([\d.]+)|M[\d.]+ ([\d.]+)", raw) for y in y if y]
    assert (min(heights), max(heights)) == (run_charts.TOP, 220 - run_charts.BOTTOM)
    means = running_means(losses, min(50.0, count / 10))
    shown = [means[index] for index in run_charts.evenly(count, run_charts.MAX_SMOOTH)]
    assert [drawn_value(height, 0.05, 0.95) for _, height in smooth] == pytest.approx(shown, abs=1e-3)


def test_the_report_smooths_over_steps_as_the_live_chart_does():
    losses = [0.3 + 0.1 * math.sin(n * 0.7) for n in range(40)]
    by_step, each = (paths(f"<g>{run_charts.loss_chart(losses, n)}</g>", "smooth")[0] for n in (2, 1))
    assert by_step != each
    expected = running_means(losses, 2 * 10)
    assert [drawn_value(y, min(losses), max(losses)) for _, y in by_step] == pytest.approx(expected, abs=1e-3)


def test_a_coordinate_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="A coordinate must be finite, got nan"):
        markup.place(math.nan)


def test_markup_escapes_what_is_not_markup():
    inner = markup.element("b", "<i>")
    made_up = markup.element("p", inner, '"&', class_="a\"><'", data_x=1)
    assert made_up == '<p class="a&quot;&gt;&lt;&#x27;" data-x="1"><b>&lt;i&gt;</b>&quot;&amp;</p>'


def test_the_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "toy_00001_.html"
    write_report(made(), path)
    first = path.read_text(encoding="utf-8")
    assert first == report_page(made())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"toy_00001_\.html could not be written: .*No space left"):
        write_report(made([0.9]), path)
    assert path.read_text(encoding="utf-8") == first
    assert list(tmp_path.iterdir()) == [path]


def test_the_pages_style_is_the_same_in_html_and_xml():
    assert not set(run_report._STYLE) & set("<&")

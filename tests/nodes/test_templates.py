"""The shipped workflow files: what ComfyUI's template browser and its dialogs for missing nodes and models read."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
DRAWN_BY_THE_PAGE = {"MarkdownNote"}  # not a node of the server
LOADS_A_MODEL = {
    "UNETLoader", "CheckpointLoaderSimple", "DualCLIPLoader", "CLIPLoader", "LTXAVTextEncoderLoader", "VAELoader",
    "CLIPVisionLoader",
}  # fmt: skip
MODEL_SITE = "https://huggingface.co/"  # the dialog only offers downloads from here and one other site
ELSEWHERE = ("example", "examples", "example_workflows", "workflow")  # any of these folders would hide ours


def each_workflow(test):
    return pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)(test)


def nodes_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["nodes"]


def test_there_are_some_and_no_other_folder_hides_them():
    assert len(WORKFLOWS) >= 13
    assert not [name for name in ELSEWHERE if (ROOT / name).exists()]


@each_workflow
def test_names_are_numbered_in_the_order_of_use(path):
    assert re.match(r"BlockSkip \d - \w", path.stem)


def test_the_first_one_is_small(nodes):
    first = next(path for path in WORKFLOWS if path.stem.startswith("BlockSkip 1"))
    assert len(nodes_of(first)) <= 12


@each_workflow
def test_models_come_in_as_few_files_as_there_are(path):
    loaders = [node["type"] for node in nodes_of(path) if node["type"] in LOADS_A_MODEL - {"CLIPVisionLoader"}]
    other = re.match(r"BlockSkip 2 - Train (?!\d+ GB)", path.stem)  # models that are published in parts
    if "LTX-2" in path.stem:
        assert len(loaders) == 2
    else:
        assert len(loaders) == (3 if other or "24 GB" in path.stem or "(paper)" in path.stem else 1)


def test_thumbnails_look_different():
    small = {
        path.stem: Image.open(path.with_suffix(".jpg")).convert("RGB").resize((16, 16)).tobytes() for path in WORKFLOWS
    }
    for one, other in itertools.combinations(small, 2):
        apart = sum(abs(a - b) for a, b in zip(small[one], small[other], strict=True)) / len(small[one])
        assert apart > 3, (one, other, apart)


@each_workflow
def test_every_node_says_where_it_comes_from(path, core):
    version = core("hosts.runs.versions").VERSION
    for node in nodes_of(path):
        if node["type"] in DRAWN_BY_THE_PAGE:
            continue
        ours = node["type"].startswith("BlockSkip_")
        assert node["properties"]["cnr_id"] == ("dit-blockskip" if ours else "comfy-core"), node["type"]
        assert node["properties"]["ver"] == version if ours else node["properties"]["ver"]


@each_workflow
def test_every_loader_says_where_its_files_are(path):
    loaders = [node for node in nodes_of(path) if node["type"] in LOADS_A_MODEL]
    assert loaders
    for node in loaders:
        models = node["properties"]["models"]
        assert {model["name"] for model in models} == {v for v in node["widgets_values"] if v.endswith(".safetensors")}
        for model in models:
            assert model["url"].startswith(MODEL_SITE)
            assert model["url"].endswith("/" + model["name"])
            assert model["directory"]


@each_workflow
def test_a_note_at_the_left_explains_it(path):
    note = next(node for node in nodes_of(path) if node["type"] == "MarkdownNote")
    assert note["title"] == "Read me"
    assert note["widgets_values"][0].startswith("## ")
    assert "`" not in note["widgets_values"][0], "Nodes 2.0 shows code in blue on brown"


@each_workflow
def test_the_note_links_to_every_file_and_says_how_large_they_are(path):
    note = next(node for node in nodes_of(path) if node["type"] == "MarkdownNote")["widgets_values"][0]
    files = [model for node in nodes_of(path) for model in node["properties"].get("models", [])]
    assert {f"[{model['name']}]({model['url']}) in models/{model['directory']}" for model in files} == {
        line.removeprefix("* ") for line in note.splitlines() if line.startswith("* [")
    }
    assert re.search(r"\*\*Files\*\*, (about|less than) \d+ GB", note)


@each_workflow
def test_seeds_stay_as_they_are(path):
    assert "randomize" not in json.dumps(nodes_of(path))


@each_workflow
def test_nothing_lies_on_something_else(path):
    boxes = [(*node["pos"], *node["size"]) for node in nodes_of(path)]
    for place, (x, y, width, height) in enumerate(boxes):
        for left, top, wide, high in boxes[place + 1 :]:
            assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y


@each_workflow
def test_the_thumbnail_is_a_small_jpeg(path):
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size < 200_000
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 440, "square in the browser of templates, on fine screens too"


def test_the_readme_names_every_workflow_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Workflows", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    named = [f"BlockSkip {step.strip('`')} - {name}.json" for step, names, _ in rows for name in names.split(", ")]
    assert sorted(named) == [path.name for path in WORKFLOWS]

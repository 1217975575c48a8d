"""The help pages describe what the nodes do: every input and output, and every error as worded in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..docs.texts import messages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def name(path):
    return path.name


@pytest.fixture(scope="module")
def schemas(nodes):
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes.NODE_CLASSES)}


def test_every_node_has_a_page_and_every_page_a_node(schemas):
    assert {page.stem for page in PAGES} == set(schemas)


def test_every_page_names_every_input_and_output(schemas):
    for node_id, schema in schemas.items():
        text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        assert schema.display_name in text
        for entry in schema.inputs:
            assert f"| `{entry.id}` |" in text, f"{node_id}: no row for {entry.id}"
        for entry in schema.outputs:
            assert f"`{entry.id}`" in text, f"{node_id}: nothing on {entry.id}"


def test_every_page_names_every_choice_of_a_combo(schemas):
    for node_id, schema in schemas.items():
        text = (DOCS / f"{node_id}.md").read_text(encoding="utf-8")
        for entry in schema.inputs:
            if entry.id not in ("lora_name", "folder", "reference_folder", "file") and entry.get_io_type() == "COMBO":
                for option in entry.options:
                    assert option in text, f"{node_id}.{entry.id}: nothing on {option}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_message_is_quoted_as_the_code_says_it(page):
    """Under "What goes wrong" the first column quotes a message; an ellipsis replaces a value."""
    section = page.read_text(encoding="utf-8").split("## What goes wrong", 1)[1].split("\n## ", 1)[0]
    quoted = re.findall(r"^\| “(.+?)” \|", section, flags=re.MULTILINE)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(quoted) == len(rows) >= 3
    known = messages()
    assert [text for text in quoted if not any(text in message for message in known)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_links_only_to_what_is_served_beside_it(page):
    """ComfyUI serves ``web/``; anything above it is not available to readers of the page."""
    assert "../" not in page.read_text(encoding="utf-8")

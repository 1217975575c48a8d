"""The Chinese texts: nothing missing, nothing extra, nothing left in English, and the same numbers as the original."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
DOCS = ROOT / "web" / "docs"
FILES = sorted(LOCALES.rglob("*.json"))
PAGES = sorted(DOCS.glob("*/zh.md"))
CHINESE = re.compile("[\u4e00-\u9fff]")
# vue-i18n interprets these as syntax, and then shows no text or the wrong one.
SYNTAX = set("{}@|")
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff\ufffd]")
PLACEHOLDER = re.compile(r"\b(?:TODO|FIXME|TBD|XXX)\b|待翻译|待补充|\?\?")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CODE = re.compile(r"`[^`\n]+`")
QUOTE = re.compile(r"^\| “(.+?)” \|", flags=re.MULTILINE)
ROW = re.compile(r"^\|.*\|$", flags=re.MULTILINE)
ROW_OF_ID = re.compile(r"^\| (`\w+`) \|", flags=re.MULTILINE)
LIST_POINT = re.compile(r"^(?:\*|\d\.) ", flags=re.MULTILINE)
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def no_key_twice(pairs):
    """Build an object of the file; plain ``json.loads`` would silently keep the last of two equal keys."""
    assert len({key for key, _ in pairs}) == len(pairs), [key for key, _ in pairs]
    return dict(pairs)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)


def leaves(value, where=()):
    """Yield every value of nested objects that is not an object, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*where, key))
    else:
        yield where, value


def name_in_brackets(display_name):
    """Return the name by which messages and documents call a node: in brackets, if the rest says what the node does."""
    return re.sub(r"^.* \((.+)\)$", r"\1", display_name)


def shape(schema):
    """Return the node's English texts in the form of ``nodeDefs.json``."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in schema.inputs},
        "outputs": {str(i): {"name": o.id, "tooltip": o.tooltip} for i, o in enumerate(schema.outputs)},
    }


def sections(page):
    """Return heading and text of each part of a page, in order."""
    parts = re.split(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not parts[0]
    return list(zip(parts[1::2], parts[2::2], strict=True))


def original(page):
    return DOCS / f"{page.parent.name}.md"


def by_node(path):
    return path.parent.name


@pytest.fixture(scope="module")
def schemas(nodes):
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes.NODE_CLASSES)}


@pytest.fixture(scope="module")
def english(schemas):
    return {node_id: shape(schema) for node_id, schema in schemas.items()}


@pytest.fixture(scope="module")
def chinese():
    return read(LOCALES / "zh" / "nodeDefs.json")


def test_the_files_are_these():
    """There is no English file: it would replace the schemas' texts, and be a second copy of them."""
    assert [str(path.relative_to(LOCALES)) for path in FILES] == ["zh/main.json", "zh/nodeDefs.json"]


def test_the_keys_are_those_of_the_schemas(english, chinese):
    """Nothing missing or extra. The frontend does not translate choices of a combo, so there are no ``options``."""
    assert {where for where, _ in leaves(chinese)} == {where for where, _ in leaves(english)}


def test_every_text_is_translated(english, chinese):
    originals = dict(leaves(english))
    for where, text in leaves(chinese):
        assert isinstance(text, str), where
        assert text == text.strip(), where
        assert text != originals[where], where
        assert CHINESE.search(text), where


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_text_can_be_shown_as_it_is(path):
    for where, text in leaves(read(path)):
        assert not SYNTAX & set(text), where
        assert not CONTROL.search(text), where
        assert not PLACEHOLDER.search(text), where
        assert "\n" not in text, where
        assert CHINESE.search(text), where


def test_every_name_ends_with_the_id_that_workflows_and_messages_use(english, chinese):
    for node_id, node in english.items():
        for kind in ("inputs", "outputs"):
            for key, entry in node[kind].items():
                assert chinese[node_id][kind][key]["name"].endswith(f" ({entry['name']})"), (node_id, key)
        short = name_in_brackets(node["display_name"].removesuffix(" (attention mask)"))
        assert chinese[node_id]["display_name"].endswith(f" ({short})")


def test_no_two_names_of_a_node_are_the_same(chinese):
    for node in chinese.values():
        for kind in ("inputs", "outputs"):
            names = [entry["name"].split(" (")[0] for entry in node[kind].values()]
            assert len(set(names)) == len(names)
    assert len({node["display_name"] for node in chinese.values()}) == len(chinese)


def test_an_input_has_the_same_name_at_every_node(chinese):
    """Memory Plan repeats widgets of other nodes; a reader must recognise them."""
    names = {}
    for node in chinese.values():
        for key, entry in node["inputs"].items():
            names.setdefault(key, set()).add(entry["name"])
    assert {key: found for key, found in names.items() if len(found) > 1} == {}


def test_numbers_and_code_are_those_of_the_original(english, chinese):
    """So that a changed number or id in a schema is not forgotten here."""
    originals = dict(leaves(english))
    for where, text in leaves(chinese):
        if where[-1] in ("tooltip", "description"):
            for pattern in (NUMBER, CODE):
                assert Counter(pattern.findall(text)) == Counter(pattern.findall(originals[where])), where


def test_every_choice_that_a_tooltip_explains_is_explained(schemas, chinese):
    for node_id, schema in schemas.items():
        for entry in schema.inputs:
            if entry.get_io_type() == "COMBO":
                tooltip = chinese[node_id]["inputs"][entry.id]["tooltip"]
                explained = [option for option in entry.options if f"{option}:" in entry.tooltip]
                assert [option for option in explained if f"{option}：" not in tooltip] == []


def test_main_names_our_category_and_our_sockets_and_nothing_of_others(schemas):
    """All packs share these keys; ``training`` below our category belongs to ComfyUI, which translates it itself."""
    sockets = {e.get_io_type() for s in schemas.values() for e in [*s.inputs, *s.outputs]}
    ours = {socket for socket in sockets if socket.startswith("BLOCKSKIP_")}
    assert ours
    main = read(LOCALES / "zh" / "main.json")
    assert set(main) == {"nodeCategories", "dataTypes"}
    assert set(main["dataTypes"]) == ours
    assert set(main["nodeCategories"]) == {schema.category.split("/")[0] for schema in schemas.values()}


def test_comfyui_finds_the_texts_in_the_pack(comfyui, tmp_path, monkeypatch, chinese):
    """Its own loader, on a custom_nodes folder that contains only our texts."""
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    shutil.copytree(LOCALES, tmp_path / "dit-blockskip" / "locales")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    found = CustomNodeManager().build_translations()
    assert found == {"zh": {**read(LOCALES / "zh" / "main.json"), "nodeDefs": chinese}}


def test_every_node_has_a_chinese_page(schemas):
    assert [by_node(page) for page in PAGES] == sorted(schemas)


@pytest.mark.parametrize("page", PAGES, ids=by_node)
def test_a_page_names_the_node_and_every_input_output_and_choice(page, schemas, chinese):
    schema, text = schemas[by_node(page)], page.read_text(encoding="utf-8")
    assert sections(page)[0][0] == chinese[schema.node_id]["display_name"]
    assert schema.display_name in text
    for entry in schema.inputs:
        assert f"| `{entry.id}` |" in text, f"no row for {entry.id}"
        if entry.id not in ("lora_name", "folder", "reference_folder", "file") and entry.get_io_type() == "COMBO":
            assert [option for option in entry.options if option not in text] == []
    for entry in schema.outputs:
        assert f"* `{entry.id}`：" in text, f"nothing on {entry.id}"


@pytest.mark.parametrize("page", PAGES, ids=by_node)
def test_a_page_is_built_as_the_original(page):
    """Part by part, so that both pages stay in step: numbers, ids, tables, list items, pictures."""
    translated, source = sections(page), sections(original(page))
    assert len(translated) == len(source)
    for (heading, text), (_, wanted) in zip(translated, source, strict=True):
        assert CHINESE.search(heading), heading
        assert Counter(NUMBER.findall(text)) == Counter(NUMBER.findall(wanted)), heading
        assert set(CODE.findall(text)) == set(CODE.findall(wanted)), heading
        for pattern in (ROW_OF_ID, LIST_POINT, TARGET):
            assert pattern.findall(text) == pattern.findall(wanted), heading
        assert [row.count("|") for row in ROW.findall(text)] == [row.count("|") for row in ROW.findall(wanted)], heading


@pytest.mark.parametrize("page", PAGES, ids=by_node)
def test_messages_are_quoted_in_english_and_explained_in_chinese(page):
    """Users search for a program's message by its words; the order is that of the original."""
    text, source = (path.read_text(encoding="utf-8") for path in (page, original(page)))
    assert QUOTE.findall(text) == QUOTE.findall(source) != []
    for line in text.splitlines():
        if QUOTE.match(line):
            assert CHINESE.search(QUOTE.sub("", line)), line


@pytest.mark.parametrize("page", PAGES, ids=by_node)
def test_pictures_are_named_from_the_folder_of_all_pages(page):
    """The frontend looks for them in ``docs/``, whichever folder the page is in."""
    text = page.read_text(encoding="utf-8")
    for target in TARGET.findall(text):
        assert (DOCS / target).is_file(), target
    assert "../" not in text


@pytest.mark.parametrize("page", PAGES, ids=by_node)
def test_a_page_holds_nothing_unfinished(page):
    text = page.read_text(encoding="utf-8")
    assert not CONTROL.search(text)
    assert not PLACEHOLDER.search(text)
    assert text.endswith("\n")
    for heading, part in sections(page):
        assert CHINESE.search(part), heading

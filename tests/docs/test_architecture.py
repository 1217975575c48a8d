"""ARCHITECTURE.md and the decisions name only what exists, and every file begins with a description."""

from __future__ import annotations

import re
import subprocess

import pytest
from blockskip_pack.devtools.code_map import code_files, code_map, first_line

from .texts import DOCUMENTS, ROOT, read, section

FILES = code_files()
MAPS = [path for path in DOCUMENTS if path.name in ("ARCHITECTURE.md", "CONTRIBUTING.md")]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
SUFFIXES = (".py", ".mjs", ".js", ".json", ".toml")
PARTS = ("Context", "Decision", "Consequences", "Evidence")


def name(path):
    return path.relative_to(ROOT).as_posix()


def spans(text):
    """Return the parts of a line of text that are formatted as code."""
    return re.findall(r"`([^`\n]+)`", text)


def exists(path):
    """Return whether a path exists, relative to the root or, as in the documents, to ``blockskip_core``."""
    return any((base / path).exists() for base in (ROOT, ROOT / "blockskip_core"))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_says_what_it_is_in_its_first_line(path):
    line = first_line(path)
    assert line, "the file has no docstring"
    assert line.endswith((".", "?", ":")), f"the first line is no whole sentence: {line}"


def test_the_map_has_every_file_once():
    listed, folder = [], ""
    for line in code_map():
        word = line.split()[0] if line else ""
        if word.endswith("/") and not line.startswith(" "):
            folder = word
            if (ROOT / folder / "__init__.py").exists():
                listed.append(f"{folder}__init__.py")
        elif word:
            listed.append(folder + word)
    assert sorted(listed) == sorted(map(name, FILES))


def test_the_map_has_all_code_of_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("what is in the repository is known from git, and this is no git checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    code = {file for file in listed if file.endswith((".py", ".mjs", ".js", ".cpp")) and (ROOT / file).is_file()}
    assert sorted(code) == sorted(map(name, FILES))


def test_the_map_finds_a_file_without_a_docstring(tmp_path):
    for file, text in {
        "a.py": "x = 1\n",
        "b.py": '"""B.\n\nMore."""\n',
        "c.mjs": "// C.\nx\n",
        "d.js": "let d\n",
    }.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert [first_line(tmp_path / file) for file in ("a.py", "b.py", "c.mjs", "d.js")] == ["", "B.", "C.", ""]


def test_every_folder_with_code_is_named_and_every_folder_named_is_there():
    named = [span.rstrip("/") for span in spans(section(read("ARCHITECTURE.md"), "Folders"))]
    paths = [span for span in named if re.fullmatch(r"[\w./-]+", span) and ("/" in span or (ROOT / span).exists())]
    assert [path for path in paths if not exists(path)] == []
    folders = {path.parent for path in FILES} - {ROOT}
    tests_of_rooms = {folder for folder in folders if folder.parent.parent == ROOT / "tests"}  # named like the code's
    assert sorted(name(folder) for folder in folders - tests_of_rooms if name(folder) not in paths) == []


@pytest.mark.parametrize("path", [*MAPS, *DECISIONS], ids=name)
def test_every_file_that_a_document_names_is_there(path):
    everywhere = {file.name for file in FILES} | {file.name for file in DOCUMENTS}
    for span in spans(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w./-]+", span) and (span.endswith(SUFFIXES) or re.search(r"/.*\.md$", span)):
            assert exists(span) or span in everywhere, span


@pytest.mark.parametrize("path", [ROOT / "ARCHITECTURE.md", *DECISIONS], ids=name)
def test_every_name_of_the_code_that_a_document_uses_is_in_the_code(path):
    code = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    names = [span for span in spans(path.read_text(encoding="utf-8")) if re.fullmatch(r"[A-Z]\w+(\.\w+)?", span)]
    assert [span for span in names if not all(re.search(rf"\b{part}\b", code) for part in span.split("."))] == []


@pytest.mark.parametrize("path", DECISIONS, ids=name)
def test_a_decision_is_short_and_whole(path):
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# {path.name[:4]}\. .+\n\nDate: \d{{4}}-\d\d-\d\d\n", text)
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, flags=re.MULTILINE) == list(PARTS)
    assert 10 <= len(text.splitlines()) <= 25


def test_the_index_of_decisions_has_them_all():
    index = read("docs/decisions/README.md")
    listed = re.findall(r"^\| (\d{4}) \| \[(.+)\]\((.+)\) \| (\S+) \|$", index, flags=re.MULTILINE)
    assert [file for _, _, file, _ in listed] == [path.name for path in DECISIONS]
    for place, (number, title, file, date) in enumerate(listed, start=1):
        assert number == f"{place:04}"
        text = read(f"docs/decisions/{file}")
        assert text.startswith(f"# {number}. {title}\n\nDate: {date}\n")

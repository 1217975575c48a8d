"""Every link in a document works on GitHub: its file exists in the repository, and its heading exists in that file."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from .texts import DOCUMENTS, ROOT

TARGET = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
ELSEWHERE = ("https://", "mailto:")
FROM_README = ("docs", "benchmarks")  # folders whose documents must be reachable from there
HELP = ROOT / "web" / "docs"


def name(path):
    return path.relative_to(ROOT).as_posix()


def without_code(text):
    """Return Markdown without code blocks and code spans, whose brackets are not links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(?: {4,}|\t).*$", "", text, flags=re.MULTILINE))


def targets(path):
    found = (a or b for a, b in TARGET.findall(without_code(path.read_text(encoding="utf-8"))))
    return [target for target in found if not target.startswith(ELSEWHERE)]


def anchors(text):
    """Return the anchors that GitHub gives to the headings: lower case, no punctuation, spaces as hyphens."""
    found, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        plain = re.sub(r"<[^>]*>|!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip()
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(path, target):
    """Return what is wrong with a link, or nothing."""
    place, _, anchor = target.partition("#")
    folder = HELP if HELP in path.parents else path.parent  # the frontend looks there, even for pages in sub-folders
    file = (folder / place.replace("%20", " ")).resolve() if place else path
    if not file.exists() or ROOT not in (file, *file.parents):
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
        return f"{target}: there is no such heading"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(path):
    assert [problem for target in targets(path) if (problem := broken(path, target))] == []


def test_every_document_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        waiting += [(path.parent / place).resolve() for t in targets(path) if (place := t.partition("#")[0])]
    wanted = {path for path in DOCUMENTS if name(path).startswith(FROM_README) or path.parent == ROOT}
    wanted -= {path for path in wanted if path.parent == ROOT / "benchmarks" / "results"}
    assert sorted(name(path) for path in wanted - reached) == []


def test_the_search_finds_what_it_looks_for():
    text = '# A `b`, c!\n## [Link](x.md)\n## A b c\n    # no\n[a](b.md#c) ![p](q.png) <img src="r.png"> `[d](e.md)`\n'
    assert anchors(text) == {"a-b-c", "link", "a-b-c-1"}
    assert [a or b for a, b in TARGET.findall(without_code(text))] == ["x.md", "b.md#c", "q.png", "r.png"]
    readme = Path(ROOT / "README.md")
    assert broken(readme, "README.md#install") is None
    assert broken(readme, "README.md#nowhere")
    assert broken(readme, "nothing.md")
    assert broken(readme, "../outside.md")

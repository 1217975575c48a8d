"""The documents of the repository, and the sentences in the shipped code."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "web/docs", "benchmarks", "demo")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
GAP = "…"


def read(name: str) -> str:
    """Return the text of a document."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return the text below a second-level heading."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(table: str) -> list[list[str]]:
    """Return the cells of all table rows except headings."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    bars = [place for place, row in enumerate(cells) if set("".join(row)) <= set("- ")]
    return [row for place, row in enumerate(cells) if place not in bars and place + 1 not in bars]


def messages() -> list[str]:
    """Return every text in the shipped code, with ``GAP`` in place of inserted values."""
    found = []
    for path in [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "blockskip_core").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values))
    return found

"""The map of the code: ``python dev.py map`` prints every file with the first line of its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("blockskip_core", "nodes", "web/js", "devtools", "benchmarks", "demo", "launch", "tests")
COMMENTED = (".js", ".mjs", ".cpp")  # these begin with a comment instead of a docstring
PLACE_OF_TEXT = 44


def code_files(root: Path = ROOT) -> list[Path]:
    """Return all files with code, folder by folder."""
    found = sorted(root.glob("*.py"))
    for folder in FOLDERS:
        code = (path for path in (root / folder).rglob("*") if path.suffix in (".py", *COMMENTED))
        found += sorted(code, key=lambda path: (path.parent, path.name))
    return found


def first_line(path: Path) -> str:
    """Return the first line of a file's docstring or of its leading comment; empty if there is none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in COMMENTED:
        line = text.partition("\n")[0]
        return line.removeprefix("//").strip() if line.startswith("//") else ""
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def code_map(root: Path = ROOT) -> Iterator[str]:
    """Yield the lines of the map: each folder with the first line of its ``__init__.py``, then its files."""
    folder = root
    for path in code_files(root):
        if path.parent != folder:
            folder = path.parent
            package = folder / "__init__.py"
            yield ""
            yield _line(f"{folder.relative_to(root).as_posix()}/", first_line(package) if package.exists() else "")
            if path == package:
                continue
        if path.name != "__init__.py" or folder == root:
            yield _line(f"    {path.name}", first_line(path))


def _line(name: str, text: str) -> str:
    return f"{name:{PLACE_OF_TEXT}}{text}".rstrip()

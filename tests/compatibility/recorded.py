"""Compares a table of outcomes with the recorded one, or records it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def assert_recorded(name: str, columns: Sequence[str], row: Sequence[str]) -> None:
    """Compare a row, identified by its first cell, with the one in a file of this folder.

    With BLOCKSKIP_RECORD=1 the row is written instead, replacing the existing one or after all others.
    """
    file = FOLDER / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"columns": columns, "rows": []}
    found = {recorded[0]: recorded for recorded in content["rows"]}
    if os.environ.get("BLOCKSKIP_RECORD"):
        content = {"columns": list(columns), "rows": list({**found, row[0]: list(row)}.values())}
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert content["columns"] == list(columns)
    assert found.get(row[0]) == list(row)

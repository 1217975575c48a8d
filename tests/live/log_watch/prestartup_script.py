"""Writes every warning and error of the server to ``warnings.jsonl`` next to its custom nodes, with the logger's name.

ComfyUI's own log has neither level nor logger. This runs before any pack is imported.
"""

import json
import logging
from pathlib import Path

RECORDS = Path(__file__).absolute().parents[2] / "warnings.jsonl"  # the pack is a link: not resolved


class _Recorder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


logging.getLogger().addHandler(_Recorder(level=logging.WARNING))

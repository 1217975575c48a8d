"""Shared by the benchmarks' commands: options, logging, importing the pack, rows in JSON-lines files and of other processes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def parser(description: str | None, results: str = "where rows, table and plot go") -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    Args:
        description: Description of the benchmark, its module's docstring.
        results: What is written to the results folder.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    made.add_argument("--results", type=Path, default=RESULTS, help=results)
    made.add_argument("--report", action="store_true", help="run nothing, write the report")
    return made


def of_adapters(description: str | None, parts: list[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of benchmarks that train DDiT's adapters on the demo's model.

    Args:
        description: Description of the benchmark, its module's docstring.
        parts: What it does, all of it by default.
    """
    made = parser(description, "where rows and table go")
    made.add_argument("--assets", type=Path, default=RESULTS.parents[1] / "demo" / "assets")
    made.add_argument("--parts", nargs="+", default=parts)
    made.add_argument("--train-steps", type=int, default=100, help="training steps of the adapters")
    made.add_argument("--train-prompts", type=int, default=56, help="pictures of that training, a prompt each")
    made.add_argument("--keep", type=Path, help="file to keep the adapters in, and to read them from")
    return made


def begin(options: argparse.Namespace, logger: logging.Logger) -> None:
    """Make the pack and its host importable, create the results folder, and log only this benchmark's messages."""
    from quality_world import use_pack

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    use_pack(options.comfyui)
    logging.getLogger().setLevel(logging.WARNING)  # the host changes the level
    logger.setLevel(logging.INFO)
    options.results.mkdir(parents=True, exist_ok=True)


def rows_in(file: Path) -> list[Row]:
    """Return the rows of a JSON-lines file, or none if there is no such file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def add_row(file: Path, row: Row) -> None:
    """Append a row to a JSON-lines file."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def row_of_process(script: Path, cell: Any, comfyui: Path, *more: Path) -> Row:
    """Run a cell in a process of its own, because an emulated card cannot be removed again, and return its row.

    Args:
        script: Takes the cell as JSON, then ``more``; the last line that it prints is the row.
        cell: A dataclass.
        comfyui: ComfyUI's folder.
        more: Further arguments.

    Raises:
        RuntimeError: If the process failed, with what it said.
    """
    done = subprocess.run(
        [sys.executable, script, json.dumps(asdict(cell)), *more], env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def remove_part(file: Path, part: str) -> None:
    """Remove the rows of a part from a JSON-lines file."""
    kept = [row for row in rows_in(file) if row["part"] != part]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def replace_rows(file: Path, part: str, rows: list[Row], made: str) -> None:
    """Replace the rows of a part in a JSON-lines file by new ones.

    Args:
        file: The file.
        part: The part's name.
        rows: The new rows.
        made: When and on what, as by :func:`about`.
    """
    remove_part(file, part)
    for row in rows:
        add_row(file, {"part": part, **row, "about": made})


def about(*, host: bool = True, card: str = "no GPU") -> str:
    """Return date, machine and software, on one line.

    Args:
        host: Whether to include ComfyUI's version.
        card: The card's name, if one is used.
    """
    import importlib.metadata as installed

    versions = [f"{name} {installed.version(name)}" for name in ("torch", "peft", "diffusers")]
    if host:
        import comfyui_version

        versions.insert(0, f"ComfyUI {comfyui_version.__version__}")
    processor = platform.processor() or platform.machine()
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({processor}), {card}; {', '.join(versions)}."

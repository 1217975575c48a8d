#!/usr/bin/env python3
"""Does it fit? Published models at full size on emulated cards, through the nodes and ComfyUI's own memory management.

The card's tensors have shapes but no data (``devtools/card/shapes.py``), so nothing is computed, but everything is
moved, kept and freed as on a real card. Each model on each card is a cell, run in a separate process; every finished
cell is a line in ``results/card.jsonl``, so a run can be stopped at any time and resumed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import card_report
import command_line
from card_runs import SMALLEST, TINY, Cell

RUN = Path(__file__).with_name("card_runs.py")
MODELS = ("FLUX.1-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "Qwen-Image", "Z-Image", "Wan2.2-TI2V-5B")
CARDS = (8.0, 12.0, 16.0, 24.0)
logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows and tables go")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--cards", nargs="+", type=float, default=CARDS, metavar="GIB")
    parser.add_argument("--quick", action="store_true", help="run one tiny model, print its tables and keep nothing")
    parser.add_argument("--again", action="store_true", help="run everything again")
    options = parser.parse_args()
    if options.comfyui is None:
        parser.error("ComfyUI's folder is missing: pass --comfyui FOLDER or set the environment variable COMFYUI_PATH")
    return options


def cells(options: argparse.Namespace) -> list[Cell]:
    """Return all cells, small cards first: bf16 on every card; fp8 and paged weights on the smallest."""
    found = [Cell(model, "bf16", card) for card in options.cards for model in options.models]
    found += [Cell(model, "fp8", SMALLEST) for model in options.models]
    found += [Cell(model, "bf16", SMALLEST, paged=True) for model in options.models]
    return sorted(found, key=lambda cell: (cell.card, cell.paged))


def run_cell(cell: Cell, comfyui: Path, *counts: Path) -> dict[str, Any]:
    """Run a cell in a separate process and return its row, or one with the error if the process failed."""
    try:
        return command_line.row_of_process(RUN, cell, comfyui, *counts)
    except RuntimeError as error:
        logger.error("%s", error)
        return {**asdict(cell), "failed": str(error).splitlines()[-1]}


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Return the last row of every cell."""
    return list({cell_of(row): row for row in command_line.rows_in(file)}.values())


def cell_of(row: dict[str, Any]) -> Cell:
    """Return the cell of a row."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def is_settled(cell: Cell, rows: list[dict[str, Any]]) -> bool:
    """Return whether a cell was run, or a smaller card had room for everything, so a larger one changes nothing."""
    for row in rows:
        if "failed" in row or replace(cell_of(row), card=cell.card) != cell:
            continue
        if row["card"] == cell.card or (row["card"] < cell.card and row["plan"]["keeps_all"]):
            return True
    return False


def run(wanted: list[Cell], file: Path, comfyui: Path) -> None:
    """Run the cells that are not in the file yet, and those that failed."""
    with tempfile.TemporaryDirectory() as counts:  # for this run only, because other code may count differently
        for cell in wanted:
            if is_settled(cell, rows_in(file)):
                continue
            row = run_cell(cell, comfyui, Path(counts))
            command_line.add_row(file, row)
            logger.info("%s, %s, %g GiB: %s", cell.model, cell.weights, cell.card, card_report.in_short(row))


def main() -> int:
    """Run, then write the report; the exit status is 1 if a cell failed."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.quick:
        row = run_cell(Cell(TINY, "bf16", 4.0), options.comfyui)
        sys.stdout.write(card_report.text([row]))
        return int("failed" in row)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "card.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    if not options.report:
        run(cells(options), file, options.comfyui)
    rows = rows_in(file)
    file.with_suffix(".md").write_text(card_report.text(rows), encoding="utf-8")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

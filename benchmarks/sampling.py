#!/usr/bin/env python3
"""All ways to sample with fewer operations: fewer steps, EasyCache, RALU, DDiT and combinations, at equal operations.

``counted`` counts what the same ways cost on published models at full size; ``pictures`` samples the demo's world with each
of them, after training adapters for DDiT on its model (``--keep`` keeps them). Rows go to ``results/sampling.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import command_line
from command_line import rows_in
from quality_world import ROOT

logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows and table go")
    parser.add_argument("--assets", type=Path, default=ROOT / "demo" / "assets")
    parser.add_argument("--parts", nargs="+", default=["counted", "pictures"])
    parser.add_argument("--prompts", type=int, default=10, help="number of pictures of each way")
    parser.add_argument("--train-steps", type=int, default=100, help="training steps of the adapters")
    parser.add_argument("--train-prompts", type=int, default=16, help="prompts of that training")
    parser.add_argument("--keep", type=Path, help="file to keep the adapters in, and to read them from")
    return parser.parse_args()


def add(file: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Replace a part's rows."""
    kept = [row for row in rows_in(file) if row["part"] != part]
    new = [{"part": part, **row, "about": command_line.about()} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *new)), encoding="utf-8")


def pictures(options: argparse.Namespace, file: Path) -> None:
    """Train the adapters unless they are kept, then sample in every way."""
    import ddit_world
    import sampling_world
    from ralu_pictures import SIZE, World

    world = World(options.assets, options.prompts)
    if options.keep and options.keep.is_file():
        trained = ddit_world.load(options.keep)
    else:
        trained, rows = ddit_world.train(world, SIZE, options.train_steps, options.train_prompts)
        add(file, "training", rows)
        if options.keep:
            ddit_world.save(trained, options.keep)
    add(file, "pictures", sampling_world.rows(world, trained))


def main() -> None:
    """Count and sample, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import sampling_counted
    import sampling_report

    file = options.results / "sampling.jsonl"
    if "counted" in options.parts and not options.report:
        add(file, "counted", sampling_counted.rows())
    if "pictures" in options.parts and not options.report:
        pictures(options, file)
    sampling_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

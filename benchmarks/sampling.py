#!/usr/bin/env python3
"""All ways to sample with fewer operations: fewer steps, EasyCache, RALU, DDiT and combinations, at equal operations.

``counted`` counts what the same ways cost on published models at full size; ``pictures`` samples the demo's world with each
of them, after training adapters for DDiT on its model (``--keep`` keeps them). Rows go to ``results/sampling.jsonl``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import command_line
from command_line import replace_rows, rows_in
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
        replace_rows(file, "training", rows, command_line.about())
        if options.keep:
            ddit_world.save(trained, options.keep)
    replace_rows(file, "pictures", sampling_world.rows(world, trained), command_line.about())


def main() -> None:
    """Count and sample, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import sampling_counted
    import sampling_report

    file = options.results / "sampling.jsonl"
    if "counted" in options.parts and not options.report:
        replace_rows(file, "counted", sampling_counted.rows(), command_line.about())
    if "pictures" in options.parts and not options.report:
        pictures(options, file)
    sampling_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

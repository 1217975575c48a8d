#!/usr/bin/env python3
"""RALU Sampler: its operations, counted at full size, and its pictures of the demo's world, judged by the reader.

Every finished row is a line in ``results/ralu.jsonl``, so a run can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import command_line
from command_line import replace_rows, rows_in
from quality_world import ROOT

logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__, "where rows, table and pictures go")
    parser.add_argument("--assets", type=Path, default=ROOT / "demo" / "assets")
    parser.add_argument(
        "--parts", nargs="+", default=["operations", "pictures", "caches"], help="also seconds, and panel"
    )
    parser.add_argument("--prompts", type=int, default=20, help="number of pictures of each arm")
    parser.add_argument("--steps", type=int, default=50, help="steps of plain sampling at full length")
    parser.add_argument("--shape", default="mid", help="for seconds: a key of speed_model.SHAPES")
    parser.add_argument("--side", type=int, default=512, help="for seconds: side of the picture")
    parser.add_argument("--plain-steps", type=int, default=5, help="for seconds: number of plain steps to run")
    parser.add_argument("--repeats", type=int, default=1, help="for seconds: number of runs for the median")
    return parser.parse_args()


def about() -> str:
    """Return date, machine and software on one line."""
    import comfyui_version
    import torch

    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {torch.get_num_threads()} of them used, no GPU; ComfyUI "
        f"{comfyui_version.__version__}, torch {torch.__version__.split('+')[0]}."
    )


def main() -> None:
    """Count and sample, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import ralu_operations
    import ralu_pictures
    import ralu_report

    file = options.results / "ralu.jsonl"
    if "operations" in options.parts and not options.report:
        replace_rows(file, "operations", ralu_operations.rows(), about())
    if "pictures" in options.parts and not options.report:
        world = ralu_pictures.World(options.assets, options.prompts)
        replace_rows(
            file, "pictures", ralu_pictures.rows(world, options.steps, options.results / "ralu_samples.jpg"), about()
        )
    if "caches" in options.parts and not options.report:
        replace_rows(
            file, "caches", ralu_pictures.rows_with_cache(ralu_pictures.World(options.assets, options.prompts)), about()
        )
    if "seconds" in options.parts and not options.report:
        import ralu_seconds

        found = ralu_seconds.rows(options.shape, options.side, options.plain_steps, options.repeats)
        replace_rows(file, f"seconds, {options.shape}, {options.side} px", found, about())
    if "panel" in options.parts:
        ralu_pictures.panel(ralu_pictures.World(options.assets, 4), ROOT / "web" / "docs" / "img" / "ralu.png")
    ralu_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Dynamic Patches (DDiT): operations counted for FLUX.1-dev and Wan, seconds of a step, pictures of the demo's world, clips.

Adapters are trained on the demo's model first, and kept beside the results with ``--keep``. ``clips`` trains a small Wan from
scratch and adapters for it. ``levels`` trains on the noise levels of coarse steps alone. Rows go to ``results/ddit.jsonl``.
"""

from __future__ import annotations

import argparse
import logging

import command_line
from command_line import replace_rows, rows_in

logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.of_adapters(__doc__, ["operations", "seconds", "pictures", "clips", "levels"])
    parser.add_argument("--side", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--prompts", type=int, default=20, help="number of pictures of each arm")
    parser.add_argument("--scales", type=int, nargs="+", default=[2], help="patch sizes to train adapters for: 2 and 4")
    parser.add_argument("--budgets", type=int, nargs="+", default=[5, 8, 12], help="operations, in plain steps")
    parser.add_argument("--full-steps", type=int, default=50, help="steps of plain sampling to compare pictures with")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each patch size whose seconds are taken")
    parser.add_argument("--clip-steps", type=int, default=600, help="training steps of the small Wan")
    return parser.parse_args()


def main() -> None:
    """Count, train and sample, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import ddit_operations
    import ddit_report

    file = options.results / "ddit.jsonl"
    if "operations" in options.parts and not options.report:
        replace_rows(file, "operations", ddit_operations.rows(), command_line.about())
    if "seconds" in options.parts and not options.report:
        import ddit_seconds

        replace_rows(file, "seconds", ddit_seconds.rows(options.repeats), command_line.about())
    if "pictures" in options.parts and not options.report:
        import ddit_world
        from ralu_pictures import World

        world = World(options.assets, options.prompts)
        trained, rows = ddit_world.kept_or_trained(world, options, options.side, tuple(options.scales))
        if rows:
            replace_rows(file, f"training, {options.side} px", rows, command_line.about())
        found = ddit_world.rows(world, trained, options.side, options.budgets, options.full_steps)
        replace_rows(file, f"pictures, {options.side} px", found, command_line.about())
    if "clips" in options.parts and not options.report:
        import ddit_clips

        for part, found in ddit_clips.rows(options.clip_steps):
            replace_rows(file, part, found, command_line.about())
    if "levels" in options.parts and not options.report:
        import ddit_levels
        from ralu_pictures import World

        world = World(options.assets, options.prompts)
        found = ddit_levels.rows(world, options.side, options.train_steps, options.train_prompts)
        replace_rows(file, f"levels, {options.side} px", found, command_line.about())
    ddit_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

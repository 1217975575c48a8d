#!/usr/bin/env python3
"""All ways to sample with fewer operations: fewer steps, EasyCache, RALU, DDiT and combinations, at equal operations.

``counted`` counts what the same ways cost on published models at full size; ``pictures`` samples the demo's world with each
of them, after training adapters for DDiT on its model (``--keep`` keeps them); ``sizes`` measures the adapters' error by the
size of pictures, and how small it would have to be for coarse steps to be as good as fewer steps; ``lora`` does some of
the ways with a LoRA of the demo (``--lora``). Rows go to ``results/sampling.jsonl`` one by one: ``--resume`` makes those
that are missing.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import command_line
from command_line import add_row, remove_part, replace_rows, rows_in

logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.of_adapters(__doc__, ["counted", "pictures", "sizes", "lora"])
    parser.add_argument("--sides", type=int, nargs="+", default=[256], help="sides of the pictures in pixels")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8], help="number of pictures of each way, by side")
    parser.add_argument(
        "--lora", type=Path, help="a LoRA that `python dev.py demo` has made; without it no rows of one"
    )
    parser.add_argument("--resume", action="store_true", help="keep the pictures' rows that are there")
    return parser.parse_args()


def sampled(options: argparse.Namespace) -> None:
    """Train the adapters unless they are kept, then sample in every way, and measure errors by size."""
    import ddit_sizes
    import ddit_world
    import sampling_lora
    import sampling_world
    from ralu_pictures import SIZE, World

    file, about = options.results / "sampling.jsonl", command_line.about()
    world = World(options.assets, max(options.prompts))
    scenes = world.scenes
    trained, _ = ddit_world.kept_or_trained(world, options, SIZE)
    replace_rows(file, "training", ddit_world.described(trained), about)
    if "sizes" in options.parts:
        world.scenes = scenes[: ddit_sizes.PICTURES]
        replace_rows(file, "sizes", ddit_sizes.errors(world, trained), about)
        replace_rows(file, "allowed", ddit_sizes.allowed(world, trained), about)
    if "lora" in options.parts and options.lora:
        replace_rows(file, "lora", list(sampling_lora.rows(world, trained, SIZE, options.lora)), about)
    for side, number in zip(options.sides, options.prompts, strict=True) if "pictures" in options.parts else ():
        part, world.scenes = f"pictures, {side} px", scenes[:number]
        if not options.resume:
            remove_part(file, part)
        done = {row["name"] for row in rows_in(file) if row["part"] == part}
        for row in sampling_world.rows(world, trained, side, done):
            add_row(file, {"part": part, **row, "about": about})


def main() -> None:
    """Count and sample, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import sampling_counted
    import sampling_report

    file = options.results / "sampling.jsonl"
    if "counted" in options.parts and not options.report:
        replace_rows(file, "counted", sampling_counted.rows(), command_line.about())
    if {"pictures", "sizes", "lora"} & set(options.parts) and not options.report:
        sampled(options)
    sampling_report.write(rows_in(file), options.results)
    sampling_report.plot(rows_in(file), options.results / "sampling.png")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""All ways to sample with fewer operations: fewer steps, EasyCache, RALU, DDiT and combinations, at equal operations.

``counted`` counts what the same ways cost on published models at full size; ``pictures`` samples the demo's world with each
of them, after training adapters for DDiT on its model (``--keep`` keeps them); ``sizes`` measures the adapters' error by the
size of pictures, and how small it would have to be for coarse steps to be as good as fewer steps; ``lora`` does some of
the ways with a LoRA of the demo (``--lora``).

The demo's model knows pictures of 256 px. For larger ones train it further, and give what that writes (a copy of the assets):

    cp -r demo/assets LARGE
    python demo/train_world.py dit --large --steps 2600 --rate 1e-3 --compile --work LARGE/work --assets LARGE \\
        --start demo/assets/blockskip_world_dit.safetensors
    python dev.py benchmark sampling -- --assets LARGE --side 512 --parts pictures sizes --keep FILE

Rows go to ``results/sampling.jsonl`` one by one: ``--resume`` makes those
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
    parser.add_argument(
        "--side", type=int, default=256, help="of the pictures in pixels, and of the adapters' training"
    )
    parser.add_argument("--prompts", type=int, default=8, help="number of pictures of each way")
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
    from ralu_pictures import World

    file, about, side = options.results / "sampling.jsonl", command_line.about(), options.side
    world = World(options.assets, options.prompts)
    scenes = world.scenes
    trained, _ = ddit_world.kept_or_trained(world, options, side)
    replace_rows(file, f"training, {side} px", ddit_world.described(trained), about)
    if "sizes" in options.parts:
        world.scenes = scenes[: ddit_sizes.PICTURES]
        replace_rows(file, f"sizes, {side} px", ddit_sizes.errors(world, trained, side), about)
        replace_rows(file, f"allowed, {side} px", ddit_sizes.allowed(world, trained, side), about)
        world.scenes = scenes
    if "lora" in options.parts and options.lora:
        replace_rows(file, "lora", list(sampling_lora.rows(world, trained, side, options.lora)), about)
    if "pictures" in options.parts:
        part = f"pictures, {side} px"
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

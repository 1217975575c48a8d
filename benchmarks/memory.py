#!/usr/bin/env python3
"""What training needs: exact counts of live bytes and operations, at full size and without a GPU.

Full-size models are counted without weights (``blockskip_core.accounting.measuring``); a smaller one is really trained,
among others through ComfyUI's own trainer, and counted in the same way. Every finished row is a line in
``results/memory.jsonl``, so a run can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import command_line

_RENAMED = {"weights": "weights_format"}  # an arm's weights are a format, a count's are bytes
logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=["real", "full", "families"], help="real, full, families; or gpu")
    parser.add_argument("--families", nargs="+", help="published models to count, by name; all if not given")
    parser.add_argument("--again", action="store_true", help="count everything again")
    return parser.parse_args()


def arms(parts: list[str], names: list[str] | None = None) -> list[Any]:
    """Return the arms of some parts, of families those with these names; models are built when first counted."""
    import memory_arms
    import memory_real

    found = list(memory_real.arms_of(memory_real.Lab())) if "real" in parts else []
    if "full" in parts:
        found += memory_arms.arms_of(memory_arms.Subject(memory_arms.FLUX))
    if "families" in parts:
        known = {family.name: family for family in known_families()}
        found += [arm for name in names or known for arm in memory_arms.arms_of_family(known[name])]
    return found


def known_families() -> list[Any]:
    """Return the published models beside FLUX.1-dev that this ComfyUI knows, and name the others."""
    import memory_arms
    from blockskip_pack.blockskip_core.hosts.families.published_sizes import is_known

    for family in memory_arms.FAMILIES:
        if not is_known(family.name):
            logger.warning("%s is not counted: this ComfyUI does not know it. Pass a newer one's folder.", family.name)
    return [family for family in memory_arms.FAMILIES[1:] if is_known(family.name)]


def key_of(row: dict[str, Any]) -> tuple:
    """Return what identifies a row."""
    names = ("part", "name", "size", "checkpointing", "weights_format", "skipped", "source")
    return tuple(tuple(row[name]) if name == "skipped" else row[name] for name in names)


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Return the last row of every key."""
    return list({key_of(row): row for row in command_line.rows_in(file)}.values())


def run(found: list[Any], file: Path, about: str) -> None:
    """Count the arms that are not in the file yet."""
    done = {key_of(row) for row in rows_in(file)}
    for arm in found:
        row = {_RENAMED.get(name, name): value for name, value in vars(arm).items() if name != "count"}
        if key_of(row) in done:
            continue
        start = time.perf_counter()
        try:
            row.update(vars(arm.count()))
        except RuntimeError as error:  # if another trainer does not run, that is a result too
            if "can't allocate memory" in str(error):
                raise  # of this machine
            row["failed"] = str(error).splitlines()[0]
        row.update(seconds=round(time.perf_counter() - start, 2), about=about)
        command_line.add_row(file, row)
        done.add(key_of(row))
        logger.info("%s, %s, %d px: %.2f GiB", arm.part, arm.name, arm.size, row.get("peak", 0) / 2**30)


def use_torch_attention() -> None:
    """Make the host choose torch's attention, its default on a card, for blocks that do not pass the override on (Ernie-Image)."""
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True


def measure_on_gpu(results: Path) -> None:
    """Measure on this machine's card, and write a separate report."""
    import memory_gpu
    import memory_real
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch cannot use a GPU here")
    about = command_line.about(card=torch.cuda.get_device_name())
    memory_gpu.write(memory_gpu.rows_of(memory_real.Lab(), about), results)


def main() -> None:
    """Count, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    if "real" not in options.parts:
        use_torch_attention()
    import memory_report

    if options.parts == ["gpu"]:
        return measure_on_gpu(options.results)
    file = options.results / "memory.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    if not options.report:
        run(arms(options.parts, options.families), file, command_line.about())
    memory_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

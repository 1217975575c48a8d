#!/usr/bin/env python3
"""What training takes: exact counts of live bytes and of operations, at full size and without a GPU.

Full-size models are counted without weights (``blockskip_core.accounting.measuring``); a smaller one is trained for real, through
ComfyUI's own trainer among others, and counted in the same way. Every finished row is a line in
``results/memory.jsonl``, so a run may be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

from quality_world import use_pack

RESULTS = Path(__file__).resolve().parent / "results"
_RENAMED = {"weights": "weights_format"}  # an arm's weights are a format, a count's are bytes
logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows, table and plot go")
    parser.add_argument("--parts", nargs="+", default=["real", "full", "families"], help="real, full, families; or gpu")
    parser.add_argument("--again", action="store_true", help="count everything anew")
    parser.add_argument("--report", action="store_true", help="count nothing, write the table and the plot")
    return parser.parse_args()


def arms(parts: list[str]) -> list[Any]:
    """The arms of some parts; models are built when the first of their arms is counted."""
    import memory_arms
    import memory_real

    found = list(memory_real.arms_of(memory_real.Lab())) if "real" in parts else []
    if "full" in parts:
        found += memory_arms.arms_of(memory_arms.Subject(memory_arms.FLUX))
    if "families" in parts:
        found += [arm for family in memory_arms.FAMILIES[1:] for arm in memory_arms.arms_of_family(family)]
    return found


def key_of(row: dict[str, Any]) -> tuple:
    """What tells rows apart."""
    names = ("part", "name", "size", "checkpointing", "weights_format", "skipped", "source")
    return tuple(tuple(row[name]) if name == "skipped" else row[name] for name in names)


def rows_in(file: Path) -> list[dict[str, Any]]:
    """All rows; of those with the same key the last."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return list({key_of(row): row for row in map(json.loads, lines)}.values())


def run(found: list[Any], file: Path, about: str) -> None:
    """Count what is not in the file yet."""
    done = {key_of(row) for row in rows_in(file)}
    for arm in found:
        row = {_RENAMED.get(name, name): value for name, value in vars(arm).items() if name != "count"}
        if key_of(row) in done:
            continue
        start = time.perf_counter()
        try:
            row.update(vars(arm.count()))
        except RuntimeError as error:  # an arm of others that does not run is a result too
            row["failed"] = str(error).splitlines()[0]
        row.update(seconds=round(time.perf_counter() - start, 2), about=about)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        done.add(key_of(row))
        logger.info("%s, %s, %d px: %.2f GiB", arm.part, arm.name, arm.size, row.get("peak", 0) / 2**30)


def about() -> str:
    """Date, machine and software, one line."""
    import importlib.metadata as installed

    import comfyui_version

    versions = ", ".join(f"{name} {installed.version(name)}" for name in ("torch", "peft", "diffusers"))
    processor = platform.processor() or platform.machine()
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({processor}), {gpu()}; "
        f"ComfyUI {comfyui_version.__version__}, {versions}."
    )


def gpu() -> str:
    """Name the GPU, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def measure_on_gpu(results: Path) -> None:
    """Measure on this machine's card, and write a report of its own."""
    import memory_gpu
    import memory_real
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use here")
    memory_gpu.write(memory_gpu.rows_of(memory_real.Lab(), about()), results)


def main() -> None:
    """Count, then write the report."""
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    use_pack(options.comfyui)
    import memory_report

    options.results.mkdir(parents=True, exist_ok=True)
    if options.parts == ["gpu"]:
        return measure_on_gpu(options.results)
    file = options.results / "memory.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    if not options.report:
        run(arms(options.parts), file, about())
    memory_report.write(rows_in(file), options.results)


if __name__ == "__main__":
    main()

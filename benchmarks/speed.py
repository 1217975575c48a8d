"""How long does a training step take? Core's trainer, a plain LoRA and BlockSkip, side by side in one run.

    python dev.py benchmark speed                 # about 20 minutes on two cores; resumes a stopped run
    python dev.py benchmark speed -- --quick      # one round of one step
    python dev.py benchmark speed -- --report     # only rewrite the table and the plot

All arms run in turn, round after round, every second round in reverse order, so that a temporary slowdown of the
machine affects all of them equally. Ratios are taken within a round. Without a GPU the model is a FLUX of a twentieth
of the size (ComfyUI's own class, random weights); with one it has the size of FLUX.1-dev.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import command_line
import speed_report
import torch

logger = logging.getLogger("speed")
Row = dict[str, Any]


def measure(
    lab: Any, arms: Iterable[Any], rounds: int, steps: int, shared: Row, file: Path, minutes: float = math.inf
) -> None:
    """Time what is not in ``file`` yet; every arm of every round becomes a line in it.

    An arm that fails is a line too, with the error instead of seconds, and is not tried again. A round is not started
    if, judging by the longest so far, it would not end within ``minutes``; the first is always run.
    """
    rows = [row for row in speed_report.rows(file) if row["key"] == shared["key"]]
    done = {(row["arm"], row["round"]) for row in rows}
    failed = {row["arm"] for row in rows if "error" in row}
    arms = list(arms)
    started, longest = time.monotonic(), 0.0
    for number in range(rounds):
        begun = time.monotonic()
        if begun - started + longest > 60 * minutes:
            logger.info("no time left for round %d of %d", number + 1, rounds)
            break
        for arm in arms if number % 2 == 0 else reversed(arms):
            if (arm.name, number) in done or arm.name in failed:
                continue
            outcome = attempt(lab, arm, steps)
            if "error" in outcome:
                failed.add(arm.name)
            row = {**shared, "date": time.strftime("%Y-%m-%d %H:%M"), "round": number, "part": arm.part,
                   "arm": arm.name, "size": arm.size, "unit": arm.unit, **outcome}  # fmt: skip
            command_line.add_row(file, row)
            logger.info("round %d, %s: %s", number + 1, arm.name, speed_report.told(outcome))
        longest = max(longest, time.monotonic() - begun)


def attempt(lab: Any, arm: Any, steps: int) -> Row:
    """Return the seconds of an arm, or the first sentence of its error."""
    from speed_model import settle

    settle()
    try:
        return {"seconds": [round(value, 5) for value in arm.run(lab, steps * arm.times)]}
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        logger.debug("%s failed", arm.name, exc_info=True)
        return {"error": speed_report.first_sentence(error)}
    finally:
        settle()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="counted steps of an arm in a round, after a warm-up step")
    parser.add_argument("--minutes", type=float, default=20, help="start no round that would not end by then")
    parser.add_argument("--quick", action="store_true", help="one round of one counted step")
    parser.add_argument("--shape", help="mid, flux-dev or tiny; by default flux-dev on a GPU, mid without one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="if not the fastest")
    parser.add_argument("--sizes", nargs=2, type=int, default=(512, 256), metavar="PIXELS")
    parser.add_argument("--draws", type=int, help="number of draws precomputed together; 64 on a GPU, 3 without one")
    parser.add_argument("--only", metavar="TEXT", help="only arms whose name contains this")
    options = parser.parse_args()
    if options.quick:
        options.rounds = options.steps = 1
    return options


def main() -> None:
    """Measure, then write the report."""
    options = parse()
    command_line.begin(options, logger)
    import host

    device = host.use_comfyui(options.comfyui)
    stem = options.results / f"speed_{device.type}"
    if not options.report:
        run(options, device, stem.with_suffix(".jsonl"))
    speed_report.write(stem)


def run(options: argparse.Namespace, device: torch.device, file: Path) -> None:
    """Measure all requested arms."""
    import speed_model
    from speed_arms import all_arms

    shape = options.shape or ("mid" if device.type == "cpu" else "flux-dev")
    dtype, reason = speed_model.fastest_dtype(device)
    if options.dtype:
        dtype, reason = getattr(torch, options.dtype), f"The model is in {options.dtype}."
    draws = options.draws or (3 if device.type == "cpu" else 64)
    large, small = options.sizes
    arms = [arm for arm in all_arms(large, small) if (options.only or "") in arm.name]
    shared = {"machine": machine(device), "versions": versions(), "shape": shape, "dtype": str(dtype), "reason": reason,
              "large": large, "small": small, "steps": options.steps, "draws": draws}  # fmt: skip
    shared["key"] = key_of(shared)
    with tempfile.TemporaryDirectory(prefix="blockskip-speed-", dir=options.results) as folder:
        lab = speed_model.Lab(speed_model.SHAPES[shape], dtype, Path(folder), sizes=(large, small), draws=draws)
        measure(lab, arms, options.rounds, options.steps, shared, file, options.minutes)


def key_of(shared: Row) -> str:
    """Return the hash of what rows in one table must share: machine, software and settings, but not the remark."""
    parts = {name: value for name, value in shared.items() if name != "reason"}
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()


def machine(device: torch.device) -> str:
    """Return the CPU, and the GPU if there is one."""
    processor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    told = f"{os.cpu_count()} cores ({processor or platform.machine()}), {torch.get_num_threads()} threads"
    return f"{told}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{told}, no GPU"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def versions() -> str:
    """Return the versions of the software."""
    import importlib.metadata as installed

    import comfyui_version
    from blockskip_pack.blockskip_core.version import VERSION

    told = [f"{name} {installed.version(name)}" for name in ("torch", "peft", "diffusers")]
    return ", ".join([f"BlockSkip {VERSION}", f"ComfyUI {comfyui_version.__version__}", *told])


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The developer's commands: ``python dev.py test``, ``demo``, ``benchmark NAME``, and ``map``.

``map`` describes every file. The others create what they need on first use (an environment and a ComfyUI, in the user's
cache folder) and reuse it afterwards. To use your own ComfyUI instead, pass ``--comfyui DIR`` or set COMFYUI_PATH.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from devtools import code_map, environment, processes, pytest_processes
from devtools.processes import hand_over, run_side_by_side, wait_for

ROOT = Path(__file__).resolve().parent
NAME_OF_GPU = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
SHORT_BENCHMARKS = {"speed": ["--quick", "--only", "256 px"], "memory": ["--parts", "gpu"]}
BENCHMARK_SECONDS = 300  # each


def main(arguments: list[str]) -> int:
    """Run a command; the exit status is pytest's or the demo's, or 1 if that could not be started."""
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else logging.INFO)
    signal.signal(signal.SIGTERM, processes.terminated)  # so that child processes end too
    try:
        return {"test": test, "demo": demo, "benchmark": benchmark, "map": show_map}[options.command](options)
    except KeyboardInterrupt:
        complain("interrupted.")
        return 130
    except (environment.EnvironmentProblem, OSError) as problem:
        if options.verbose:
            raise
        complain(str(problem))
        return 1


def complain(text: str) -> None:
    """Print an error message."""
    sys.stderr.write(f"dev.py: {text}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; arguments after ``--`` go to pytest or to the benchmark."""
    own, further = split_at_dashes(arguments)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--comfyui", metavar="DIR", help="your own ComfyUI folder (or set COMFYUI_PATH)")
    shared.add_argument("--verbose", action="store_true", help="show the tools' output and full tracebacks")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    tests = commands.add_parser("test", parents=[shared], help="run the tests; arguments after -- go to pytest")
    where = tests.add_mutually_exclusive_group()
    where.add_argument("--card", action="store_true", help="only the tests on an emulated card")
    where.add_argument("--gpu", action="store_true", help="the tests on a real card, and short benchmarks")
    show = commands.add_parser("demo", parents=[shared], help="train a small LoRA and show the results")
    show.add_argument("--keep", action="store_true", help="keep the server running until Ctrl-C")
    show.add_argument("--subject", default="toby", help="subject to train: toby, mila, pip, zuzu or nori")
    show.add_argument("--pictures", metavar="DIR", type=Path, help="your own drawings with captions instead")
    show.add_argument("--output", metavar="DIR", type=Path, default="demo_output", help="where the results go")
    measure = commands.add_parser("benchmark", parents=[shared], help="measure; arguments after -- go to the benchmark")
    measure.add_argument("name", choices=benchmark_names())
    commands.add_parser("map", parents=[shared], help="describe every file")
    options = parser.parse_args(own)
    if further and options.command in ("demo", "map"):
        parser.error(f"the {options.command} command takes no arguments after --")
    return argparse.Namespace(**vars(options), further=further)


def benchmark_names() -> list[str]:
    """The benchmarks; a file with an underscore in its name is part of one, like ``quality_arms`` of ``quality``."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "_" not in path.stem)


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after the first ``--``."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def test(options: argparse.Namespace) -> int:
    """Run pytest; a run without any test is a failure too (pytest's own status 5)."""
    host = environment.find_host(options.comfyui)
    variables = {"COMFYUI_PATH": str(host)}
    if not os.environ.get("BLOCKSKIP_COMFYUI_0_18"):
        variables["BLOCKSKIP_COMFYUI_0_18"] = str(environment.fetched_host(environment.OLDER_HOST))
    python = environment.interpreter(host)
    if options.gpu:
        return test_on_gpu(python, options.further, variables)
    device = "card" if options.card else None
    commands = [
        pytest_command(python, arguments) for arguments in pytest_processes.arguments_of_each(options.further, device)
    ]
    if len(commands) == 1:
        return hand_over(commands[0], variables)
    at_once = min(len(commands), os.cpu_count() or 1, 2)
    threads = {"OMP_NUM_THREADS": "1"} if at_once > 1 else {}
    statuses = run_side_by_side(commands, {**variables, **threads}, at_once)
    return pytest_processes.combined_status(statuses)


def pytest_command(python: Path, arguments: list[str]) -> list[str | Path]:
    """Return the command for pytest with these arguments."""
    return [python, "-m", "pytest", "--import-mode=importlib", *arguments]


def test_on_gpu(python: Path, further: list[str], variables: dict[str, str]) -> int:
    """Run the card tests on a real card, then benchmarks for at most ten minutes; their results name the card."""
    gpu = subprocess.run([str(python), "-c", NAME_OF_GPU], capture_output=True, text=True).stdout.strip()
    if not gpu:
        complain("torch cannot use a GPU here. `python dev.py test --card` runs the same tests on an emulated one.")
        return 1
    logging.info("On %s", gpu)
    (arguments,) = pytest_processes.arguments_of_each(further, "gpu")
    statuses = [wait_for(pytest_command(python, arguments), variables)]
    for name, arguments in SHORT_BENCHMARKS.items():
        command = [python, ROOT / "benchmarks" / f"{name}.py", *arguments]
        status = wait_for(command, variables, seconds=BENCHMARK_SECONDS)
        if status is None:
            complain(
                f"the benchmark {name} was stopped after {BENCHMARK_SECONDS} seconds; its measurements so far are kept."
            )
        statuses.append(status or 0)
    return pytest_processes.combined_status(statuses)


def demo(options: argparse.Namespace) -> int:
    """Run the demo in the environment."""
    host = environment.find_host(options.comfyui)
    command = [environment.interpreter(host), ROOT / "devtools" / "demo.py"]
    command += ["--output", options.output.resolve(), "--subject", options.subject]
    command += ["--pictures", options.pictures.resolve()] if options.pictures else []
    command += ["--keep"] if options.keep else []
    command += ["--verbose"] if options.verbose else []
    return hand_over(command, {"COMFYUI_PATH": str(host)})


def benchmark(options: argparse.Namespace) -> int:
    """Run a benchmark in the environment."""
    host = environment.find_host(options.comfyui)
    command = [environment.interpreter(host), ROOT / "benchmarks" / f"{options.name}.py", *options.further]
    return hand_over(command, {"COMFYUI_PATH": str(host)})


def show_map(options: argparse.Namespace) -> int:
    """Print the map of the code."""
    sys.stdout.writelines(f"{line}\n" for line in code_map.code_map())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

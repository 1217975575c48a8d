#!/usr/bin/env python3
"""The developer's commands: ``python dev.py test``, ``demo``, ``benchmark NAME``, and ``map``.

``map`` prints what every file is. The others make what they need on first use (an environment and a ComfyUI, kept in the
user's cache folder) and reuse it afterwards. ``--comfyui DIR`` or the variable COMFYUI_PATH names a ComfyUI of your own
instead.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from devtools import code_map, environment

ROOT = Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Run a command; the exit status is pytest's or the demo's, or 1 when the way there failed."""
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that tools being waited for end too
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
    """Tell the user why it ends here."""
    sys.stderr.write(f"dev.py: {text}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; what follows ``--`` goes to pytest or to the benchmark."""
    own, further = split_at_dashes(arguments)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--comfyui", metavar="DIR", help="a ComfyUI folder of your own (or set COMFYUI_PATH)")
    shared.add_argument("--verbose", action="store_true", help="show the tools' output and full tracebacks")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("test", parents=[shared], help="run the tests; arguments after -- go to pytest")
    show = commands.add_parser("demo", parents=[shared], help="train a small LoRA and show the results")
    show.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    show.add_argument("--subject", default="toby", help="whom to teach: toby, mila, pip, zuzu or nori")
    show.add_argument("--pictures", metavar="DIR", type=Path, help="your own drawings with captions, instead")
    show.add_argument("--output", metavar="DIR", type=Path, default="demo_output", help="where the results go")
    measure = commands.add_parser("benchmark", parents=[shared], help="measure; arguments after -- go to the benchmark")
    measure.add_argument("name", choices=benchmark_names())
    commands.add_parser("map", parents=[shared], help="print every file with what it is")
    options = parser.parse_args(own)
    if further and options.command in ("demo", "map"):
        parser.error(f"the {options.command} command takes no arguments after --")
    return argparse.Namespace(**vars(options), further=further)


def benchmark_names() -> list[str]:
    """The benchmarks; a file with an underscore in its name is a part of one, as ``quality_arms`` is of ``quality``."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "_" not in path.stem)


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first ``--``, and what stands after it."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def test(options: argparse.Namespace) -> int:
    """Run pytest; a run without any test is a failure too (pytest's own status 5)."""
    host = environment.find_host(options.comfyui)
    variables = {"COMFYUI_PATH": str(host)}
    if not os.environ.get("BLOCKSKIP_COMFYUI_0_18"):
        variables["BLOCKSKIP_COMFYUI_0_18"] = str(environment.fetched_host(environment.OLDER_HOST))
    python = environment.interpreter(host)
    command = [python, "-m", "pytest", "--import-mode=importlib", *options.further]
    return hand_over(command, variables)


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


def hand_over(command: list[str | Path], variables: dict[str, str]) -> int:
    """Become `command`, in the repository root, so that signals reach it and its status is ours."""
    surroundings = {"OMP_NUM_THREADS": str(min(os.cpu_count() or 1, 8)), **os.environ, **variables}
    surroundings.pop("PYTHONPATH", None)  # a stray path could put this pack's `nodes` before ComfyUI's
    words = list(map(str, command))
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        return subprocess.call(words, cwd=ROOT, env=surroundings)
    os.chdir(ROOT)
    os.execve(words[0], words, surroundings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

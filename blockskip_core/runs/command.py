"""The command that trains from a run file, in one process or in several; ``blockskip_core.train`` starts it.

Several processes are started by torchrun, by ``accelerate launch``, or by whatever has initialised torch's default
process group before it calls :func:`main`. Their number must divide the run's accumulation. All of them must see the
same folders.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import BlockSkipError
from ..training.together import Together, joined
from .console import Console, Stopped
from .host import Places, ReadyRun, host_named
from .named_folders import NamedFolders
from .run_file import RunFile

logger = logging.getLogger(__name__)

FAILED = 1
STOPPED = 128  # plus the signal's number, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as a run file says, and return the exit code: 0 if all steps are made and saved.

    Args:
        arguments: Those of the command line, without the program's name; by default this process's.
    """
    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    with joined() as together, _logging(together):
        console = Console(together.rank)
        if arguments is None:
            console.listen()
        try:
            return 0 if _train(options, together, console) else FAILED
        except BlockSkipError as error:
            logger.error("%s", error)
            return FAILED
        except Stopped:
            logger.warning("Stopped. Start the same command again to continue.")
            return STOPPED + console.signal


def _train(options: argparse.Namespace, together: Together, console: Console) -> bool:
    """Prepare in every process, agree that all can start, and train; return False if one cannot."""
    ready, problem = None, ""
    try:
        ready = _ready(options, together, console)
    except BlockSkipError as error:
        problem = str(error)
    problems = together.gathered(problem)
    found = next((rank for rank, text in enumerate(problems) if text), None)
    if found is not None or ready is None:
        if together.rank == 0:
            logger.error("%s%s", f"Process {found}: " if found else "", problems[found or 0])
        return False
    together.require_equal(json.dumps(ready.agreed, sort_keys=True), _disagreement)
    ready.train()
    return True


def _disagreement(rank: int, first: str, other: str) -> str:
    """Return what two processes do not have in common, as a sentence."""
    a, b = json.loads(first), json.loads(other)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return (
        f"Process {rank} would train another run than process 0: it differs in {', '.join(names)}. Give all processes the "
        "same run file, model and software."
    )


def _ready(options: argparse.Namespace, together: Together, console: Console) -> ReadyRun:
    run = RunFile.read(options.run)
    places = _places(options)
    host = host_named(run.host)
    host.start(places, options.host_arguments)
    return host.prepare(run, places, console, together)


def _places(options: argparse.Namespace) -> Places:
    return Places(
        program=options.comfyui,
        models=NamedFolders(options.models, "--models"),
        data=NamedFolders(options.data or [options.run.parent], "--data"),
        output=options.output,
    )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; what follows "--" is for the host."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:end])
    options.host_arguments = arguments[end + 1 :]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockskip_core.train",
        description="Train a LoRA as a run file says. Nothing outside the named folders is read or written.",
        usage="%(prog)s RUN --output DIR [options] [-- arguments for the host: ComfyUI's own, or diffusers' --device NAME]",
        epilog="Several processes: torchrun --nproc_per_node 2 -m blockskip_core.train ...",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run file")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", action="append", default=[],
        help="a folder that model files may be read from; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR", action="append",
        help="a folder that the run's material may be read from; the run file's own folder if not given",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", required=True,
        help="where the LoRA, residuals and training states are written and looked for: ComfyUI's output folder, or a "
        "copy of it",
    )  # fmt: skip
    return parser


@contextmanager
def _logging(together: Together) -> Iterator[None]:
    """Write what this package logs to standard output; a program's own logging is left alone."""
    handler = logging.StreamHandler(sys.stdout)
    who = f"[process {together.rank}] " if together.size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s"))
    package = logging.getLogger(str(__package__).rpartition(".")[0])
    before = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = before

"""Which pytest processes ``python dev.py test`` runs: the ordinary tests in parts, and those on a card.

An emulated card cannot be removed from a process, so the tests on it run in separate processes. The parts start in the
order given here, two at a time on machines with at least two cores; the longest come first, which keeps both cores busy
until the end. Standard library only, like ``dev.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = "tests/card"
PARTS = (  # longest first; the empty one is everything that no other part names
    ("tests/hosts", "tests/docs"),
    (),
    ("tests/live", "tests/faults"),
    ("tests/core", "tests/demo"),
)
ON_CARD_TOO = (  # tests of the nodes that run on either device
    "tests/nodes/test_run.py",
    "tests/nodes/test_memory_plan.py",
    "tests/nodes/test_ralu_sampler.py",
    "tests/nodes/run/test_samples.py",
    "tests/nodes/run/test_memory_check.py",
    "tests/nodes/run/test_resume.py",
)
NO_TESTS = 5  # pytest's exit status when nothing was selected


def arguments_of_each(arguments: Sequence[str], device: str | None = None) -> list[list[str]]:
    """Return the arguments of each pytest process.

    Args:
        arguments: The developer's arguments for pytest. Paths select the processes; without paths, all of them run.
        device: ``card`` or ``gpu`` to run only on that; None for the ordinary tests and those on an emulated card.
    """
    paths = [argument for argument in arguments if is_path(argument)]
    if device is not None:
        return [["--device", device, *arguments, *(() if paths else (CARD, *ON_CARD_TOO))]]
    on_card = [path for path in paths if is_path(path, below=CARD)]
    options = [argument for argument in arguments if argument not in paths]
    ordinary = [path for path in paths if path not in on_card]
    if not paths:
        *longer, shortest = _parts(options)
        on_card, on_either = (["--device", "card", *options, *part] for part in ((CARD,), ON_CARD_TOO))
        return [*longer, on_card, shortest, on_either]
    processes = []
    if ordinary:
        processes.append([*options, *ordinary, f"--ignore={CARD}"])
    if on_card:
        processes.append(["--device", "card", *options, *on_card])
    return processes


def _parts(options: Sequence[str]) -> Iterator[list[str]]:
    named = [folder for part in PARTS for folder in part]
    for part in PARTS:
        rest = [] if part else ["tests", *(f"--ignore={folder}" for folder in (CARD, *named))]
        yield [*options, *part, *rest]


def is_path(argument: str, below: str = ".") -> bool:
    """Return whether an argument names a file or folder below another one, or a test in it."""
    path = (ROOT / argument.partition("::")[0]).resolve()
    return not argument.startswith("-") and path.exists() and path.is_relative_to((ROOT / below).resolve())


def combined_status(statuses: Iterable[int]) -> int:
    """Return the combined exit status: that of the first failed process; no tests only counts if none had any."""
    statuses = list(statuses)
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    if failed:
        return failed[0]
    return 0 if 0 in statuses else NO_TESTS

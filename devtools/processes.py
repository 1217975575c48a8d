"""Runs programs for ``dev.py``: replaces this process by one, or waits for one. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from .environment import cache_folder

ROOT = Path(__file__).resolve().parents[1]
Command = Sequence[str | Path]
_SECONDS_BETWEEN_LOOKS = 0.2


class Terminated(KeyboardInterrupt):
    """This process was told to end by a signal that, unlike Ctrl-C, did not reach its children."""


def terminated(*_: object) -> None:
    """Handle SIGTERM."""
    raise Terminated


def hand_over(command: Command, variables: Mapping[str, str]) -> int:
    """Replace this process by `command`, so that signals reach it and its exit status is passed on."""
    words = list(map(str, command))
    _flush()
    if os.name == "nt":
        return subprocess.call(words, cwd=ROOT, env=_surroundings(variables))
    os.chdir(ROOT)
    os.execve(words[0], words, _surroundings(variables))


def wait_for(command: Command, variables: Mapping[str, str], seconds: float | None = None) -> int | None:
    """Return the exit status of `command`, or None if it was interrupted because it took longer than ``seconds``."""
    _flush()
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=_surroundings(variables))
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        _interrupt(child)
        return None
    except Terminated:
        _interrupt(child)
        raise
    except KeyboardInterrupt:
        child.wait()
        raise


def run_side_by_side(commands: Sequence[Command], variables: Mapping[str, str], at_once: int) -> list[int]:
    """Return the exit status of each command. A command's output is shown all at once when it is done.

    Args:
        commands: In the order in which they are started.
        variables: Environment variables for all of them.
        at_once: How many may run at the same time.
    """
    waiting, running, statuses = list(enumerate(commands)), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                index, command = waiting.pop(0)
                running[index] = _start_quietly(command, variables)
            for index, (child, output) in list(running.items()):
                if child.poll() is not None:
                    statuses[index] = child.returncode
                    _show(output)
                    del running[index]
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for child, output in running.values():  # interrupted
            _interrupt(child)
            _show(output)
    return [statuses[index] for index in range(len(commands))]


def _start_quietly(command: Command, variables: Mapping[str, str]) -> tuple[subprocess.Popen, IO[bytes]]:
    _flush()
    output = tempfile.TemporaryFile()
    words = list(map(str, command))
    child = subprocess.Popen(
        words, cwd=ROOT, env=_surroundings(variables), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    return child, output


def _show(output: IO[bytes]) -> None:
    output.seek(0)
    sys.stdout.write(output.read().decode(errors="replace"))
    sys.stdout.flush()
    output.close()


def _interrupt(child: subprocess.Popen) -> None:
    if os.name == "nt":
        child.terminate()
    else:
        child.send_signal(signal.SIGINT)
    child.wait()


def _surroundings(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a program's environment variables."""
    own = {
        "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, 8)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin: beside other work that costs most of the time
        "PYTHONPYCACHEPREFIX": str(cache_folder() / "bytecode"),
        "MYPY_CACHE_DIR": str(cache_folder() / "mypy"),
    }
    found = {**own, **os.environ, **variables}
    found.pop("PYTHONPATH", None)  # a stray path could put this pack's `nodes` before ComfyUI's
    found.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process would compile torch and ComfyUI again
    return found


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()

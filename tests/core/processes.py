"""Several processes in one test: copies of this one, joined by torch's gloo, which take no time to start."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from blockskip_pack.blockskip_core.training.together import Processes

SECONDS = 60.0
"""After this a process that hangs is killed, and its test fails."""

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="copies of a process are made by fork")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        result: What its function returned; None if it raised or was killed.
        error: "Class: message" of what it raised, or "".
        signal: The signal that ended it, or 0.
    """

    result: Any
    error: str
    signal: int


def in_processes(folder: Path, size: int, work: Callable[[Processes], Any]) -> list[Ended]:
    """Run ``work`` in ``size`` processes and return how each ended, by rank."""
    import diffusers.optimization  # noqa: F401 - slow to import: once here, not in every process
    import peft  # noqa: F401

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    processes = [_start(folder, rank, size, work) for rank in range(size)]
    return [_end(folder, rank, process) for rank, process in enumerate(processes)]


def _start(folder: Path, rank: int, size: int, work: Callable[[Processes], Any]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a copy of a process with threads; they are idle
        process = os.fork()
    if process:
        return process
    torch.set_num_threads(1)  # a copy has none of the threads that OpenMP would wait for
    found: dict[str, Any] = {"result": None, "error": ""}
    try:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
        )
        found["result"] = work(Processes())
    except BaseException as error:  # noqa: BLE001 - the test judges it
        found["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    torch.save(found, folder / f"found-{rank}.pt")
    os._exit(0)


def _end(folder: Path, rank: int, process: int) -> Ended:
    deadline = time.monotonic() + SECONDS
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            pytest.fail(f"process {rank} hangs")
        time.sleep(0.01)
    return _found(folder, rank)


def _found(folder: Path, rank: int) -> Ended:
    path = folder / f"found-{rank}.pt"
    if not path.exists():
        return Ended(None, "", signal.SIGKILL)
    found = torch.load(path)
    path.unlink()
    return Ended(found["result"], found["error"], 0)

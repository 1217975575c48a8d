"""A program with ComfyUI and the pack loaded, which runs the graph in forked copies of itself.

Starting ComfyUI takes seconds, ``fork`` takes none. Commands arrive as lines of JSON on standard input, responses go to
standard output. A copy can be told to inject a fault: to be killed at an event of its file system, or to let its disk
fill up. ``fork_client`` starts this as a script.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_graph
import torch

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
FILLER = "filler"


def serve(orders: Any, answers: Any) -> None:
    """Handle commands until there are no more."""
    for line in orders:
        order = json.loads(line)
        answer = {"start": start, "wait": wait, "mount": mount, "look": look}[order.pop("do")](**order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def start(base: str, graph: dict[str, Any], fault: dict[str, Any] | None, disk: str | None = None) -> int:
    """Run the graph in a copy of this process, with its files below ``disk`` (default ``base/disk``); return its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            status = _run(Path(base), graph, fault or {}, Path(disk) if disk else Path(base) / "disk")
        finally:
            os._exit(status)
    return process


def wait(process: int) -> dict[str, Any]:
    """Whether a copy has ended, and by which signal."""
    found, status = os.waitpid(process, os.WNOHANG)
    signalled = found != 0 and os.WIFSIGNALED(status)
    return {"ended": found != 0, "signal": os.WTERMSIG(status) if signalled else None}


def mount(path: str, size: int) -> bool:
    """Mount a small file system that only this process and its copies see."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def look(base: str) -> dict[str, Any]:
    """The files below a folder."""
    path = Path(base)
    return {
        "digests": tiny_graph.digests(path),
        "damaged": tiny_graph.damaged(path),
        "leftovers": tiny_graph.leftovers(path),
    }


def _run(base: Path, graph: dict[str, Any], fault: dict[str, Any], disk: Path) -> int:
    """Run the graph with its files below ``disk``; write the outcome to ``base/outcome.json``."""
    with open(base / "log.txt", "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    tiny_graph.use_folders(disk)
    outcome: dict[str, Any] = {"error": None, "sentence": None, "events": [], "ui": None}
    try:
        with _faults(disk, fault, outcome["events"]):
            trained = tiny_graph.run(**graph)
        outcome["ui"] = trained.ui["blockskip"][0]
        torch.save(dict(trained[0]), base / "output.pt")
    except BaseException as error:  # noqa: BLE001  the test judges it
        outcome["error"], outcome["sentence"] = [kind.__name__ for kind in type(error).__mro__], str(error)
        traceback.print_exc()
    (base / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return 0


@contextlib.contextmanager
def _faults(disk: Path, fault: dict[str, Any], events: list[str]) -> Iterator[None]:
    if fault.get("kind") in ("record", "kill"):
        _watch(str(disk / "output"), fault.get("event"), events)
    if fault.get("no reserve"):  # a small disk never has the space that is left free for others
        tiny_graph.pack("blockskip_core.residuals.cache").DISK_RESERVE_BYTES = 0
    if fault.get("kind") == "fill":
        _fill_before(disk, **fault["when"])
    yield


def _watch(output: str, last: int | None, events: list[str]) -> None:
    """Record every file system event below a folder; at event number ``last`` this process is killed.

    A file that is about to be flushed is first cut in half, as if the process had died while writing it.
    """

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not isinstance(args[0], (str, os.PathLike)):
            return
        path = os.fspath(args[0])
        if not path.startswith(output) or (event == "open" and not _writes(args)):
            return
        if len(events) == last:
            if event == "open" and os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(f"{event} {os.path.relpath(path, output)}")

    sys.addaudithook(hook)


def _writes(args: tuple) -> bool:
    mode, flags = args[1], args[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wa+x")
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def _fill_before(disk: Path, pattern: str, room: int, how: str, once: bool) -> None:
    """Leave only ``room`` bytes on the disk when a file of that name is about to be written; free the rest afterwards.

    ``how`` is "file system" (a small one is filled up) or "file size limit" (the system refuses larger files).
    Unless it happens only ``once``, the disk stays full from then on.
    """
    filling = {"file system": _filled, "file size limit": _limited}[how]
    atomic = tiny_graph.pack("blockskip_core.files").write_atomically

    def write_atomically(path: Path, write: Any) -> None:
        with contextlib.ExitStack() as own:
            if fnmatch.fnmatch(path.name, pattern) or full:
                full.extend(() if once else [path.name])
                own.enter_context(filling(disk, room))
            atomic(path, write)

    full: list[str] = []
    for name in ("residuals.cache", "training.checkpoints", "hosts.files.lora_files", "reporting.run_report"):
        tiny_graph.pack(f"blockskip_core.{name}").write_atomically = write_atomically


@contextlib.contextmanager
def _filled(disk: Path, room: int) -> Iterator[None]:
    filler = disk / FILLER
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _limited(disk: Path, room: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep other output out of the responses
    tiny_graph.prepare()
    serve(sys.stdin, own_output)

"""Starts ``fork_server`` and sends it commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

PROGRAM = Path(__file__).with_name("fork_server.py")
LONGEST_RUN_S = 120.0
BETWEEN_LOOKS_S = 0.05


NAMESPACES = (("unshare", "-m"), ("unshare", "-rm"))
"""Commands under which a process may mount privately: as the administrator, and as any user."""


def may_mount(namespace: Sequence[str]) -> bool:
    """Whether this system allows mounting under that command."""
    trial = "mount -t tmpfs -o size=1m tmpfs /tmp"
    try:
        return subprocess.run([*namespace, "sh", "-c", trial], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class ForkServer:
    """A fork server for a ``with`` block.

    Args:
        wrapper: A command that starts it, one of ``NAMESPACES`` or none.

    Attributes:
        may_mount: Whether it may mount a small file system.
    """

    def __init__(self, wrapper: Sequence[str] = ()) -> None:
        self.may_mount = bool(wrapper)
        command = [*wrapper, sys.executable, str(PROGRAM)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def ask(self, do: str, **order: Any) -> Any:
        """Send a command and return the response."""
        self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._said.seek(0)
            raise RuntimeError(f"The fork server has ended: {self._said.read()[-2000:]}")
        return json.loads(answer)

    def run(
        self,
        base: Path,
        graph: dict[str, Any] | None = None,
        fault: dict[str, Any] | None = None,
        *,
        kill_after: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> SimpleNamespace:
        """Run the graph with its files below ``base/disk`` and wait for its end.

        Args:
            base: A folder; created if it does not exist.
            graph: Settings that differ from ``tiny_graph``'s.
            fault: The injected fault, see ``fork_server``.
            kill_after: Seconds after which it is killed.
            meanwhile: Called repeatedly while it runs.

        Returns:
            ``killed``; ``seconds``; and unless it was killed, ``error`` (names of the error's classes, or None),
            ``sentence``, ``ui`` and ``events``.
        """
        return self.run_together([Order(base, graph, fault, kill_after)], meanwhile)[0]

    def run_together(self, orders: Sequence[Order], meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """Run several graphs at the same time; see :meth:`run`."""
        began, looked = time.monotonic(), 0.0
        running = [(order, self._start(order)) for order in orders]
        ended: dict[int, SimpleNamespace] = {}
        while len(ended) < len(running):
            passed = time.monotonic() - began
            for order, process in running:
                if process in ended:
                    continue
                if (end := self.ask("wait", process=process))["ended"]:
                    ended[process] = _outcome(order, end["signal"], passed)
                elif passed > LONGEST_RUN_S:
                    os.kill(process, signal.SIGKILL)
                    raise TimeoutError(order.log())
                elif order.kill_after is not None and passed >= order.kill_after:
                    os.kill(process, signal.SIGKILL)  # its id is not reused before it has been waited for
            if passed >= looked + BETWEEN_LOOKS_S:
                meanwhile()
                looked = passed
            time.sleep(0.005)
        return [ended[process] for _, process in running]

    def _start(self, order: Order) -> int:
        order.base.mkdir(parents=True, exist_ok=True)
        (order.base / "outcome.json").unlink(missing_ok=True)
        disk = order.disk and str(order.disk)
        return self.ask("start", base=str(order.base), graph=order.graph or {}, fault=order.fault, disk=disk)


@dataclass(frozen=True)
class Order:
    """A run of the graph; see :meth:`ForkServer.run`.

    Attributes:
        disk: Where its files are, if not in ``base/disk``; two runs may share one.
    """

    base: Path
    graph: dict[str, Any] | None = None
    fault: dict[str, Any] | None = None
    kill_after: float | None = None
    disk: Path | None = None

    def log(self) -> str:
        """The end of the run's output."""
        return (self.base / "log.txt").read_text(encoding="utf-8")[-2000:]


def _outcome(order: Order, ended_by: int | None, seconds: float) -> SimpleNamespace:
    found = SimpleNamespace(killed=ended_by == signal.SIGKILL, seconds=seconds)
    if not found.killed:
        assert ended_by is None, order.log()
        vars(found).update(json.loads((order.base / "outcome.json").read_text(encoding="utf-8")))
    return found

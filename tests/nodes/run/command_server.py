"""A program with the command and ComfyUI loaded, which carries out command lines in forked copies of itself.

Importing everything takes ten seconds, ``fork`` takes none. Orders arrive as lines of JSON on standard input. A copy sees
the variables that torchrun sets, so several of them join as torchrun's workers do. ``outside`` starts this as a script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def serve(orders: Any, answers: Any) -> None:
    """Handle orders until there are no more."""
    for line in orders:
        order = json.loads(line)
        answer = {"start": start, "wait": wait}[order.pop("do")](**order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def start(arguments: list[str], log: str, variables: dict[str, str], event: dict[str, Any] | None) -> int:
    """Carry out the command in a copy of this process, and return its id.

    ``event`` is a signal that the copy sends itself when a phase has reached a count.
    """
    process = os.fork()
    if process == 0:
        status = 70
        try:
            with open(log, "ab", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(variables)
            sys.argv = ["train", *arguments]
            status = _carried_out(event)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 71
        except BaseException:  # noqa: BLE001 - it must not return into the server
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return process


def _carried_out(event: dict[str, Any] | None) -> int:
    from blockskip_core.runs import command, console

    if event is not None:
        real = console.Console.__call__

        def watched(self: Any, phase: str, done: int, total: int, detail: str = "") -> None:
            if phase == event["phase"] and done == event["done"]:
                os.kill(os.getpid(), getattr(signal, event["signal"]))
            real(self, phase, done, total, detail)

        console.Console.__call__ = watched
    return command.main()


def wait(process: int) -> dict[str, Any]:
    """Whether a copy has ended, and how: its exit code, or minus the signal."""
    found, status = os.waitpid(process, os.WNOHANG)
    return {"ended": found != 0, "code": os.waitstatus_to_exitcode(status) if found else None}


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep other output out of the answers
    sys.path.insert(0, str(ROOT))
    from blockskip_core.hosts.runs import from_file
    from blockskip_core.runs import command  # noqa: F401 - loaded for the copies
    from blockskip_core.runs.host import Places
    from blockskip_core.runs.named_folders import NamedFolders

    places = Places(Path(sys.argv[1]), NamedFolders([], ""), NamedFolders([], ""), Path(sys.argv[2]))
    from_file.start(places, ["--cpu"])
    import peft  # noqa: F401
    from diffusers import optimization  # noqa: F401

    from blockskip_core.hosts.models import model_file  # noqa: F401
    from blockskip_core.hosts.runs import console_view, prepare, training  # noqa: F401

    serve(sys.stdin, own_output)

"""The seam between a run file and the host that trains it: ComfyUI, or another one with a module of its own.

A host is a module below ``hosts`` with two functions, :class:`RunHost`. To add one: write that module, and add its name
to ``HOSTS``. A run file then names it as ``host``, and ``model`` and ``settings`` are whatever its ``prepare`` reads.
The host's program is imported only after ``start``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import InvalidInputError
from ..training.together import Together
from .named_folders import NamedFolders
from .run_file import RunFile

HOSTS: Mapping[str, str] = {"comfyui": "hosts.runs.from_file", "diffusers": "hosts.diffusers.from_file"}
"""Name in run files -> module of the core."""


@dataclass(frozen=True)
class Places:
    """The folders that the user has named on the command line: nothing else is read or written.

    Attributes:
        program: The host's own folder, or None where it is an installed package.
        models: Where model files may be read.
        data: Where the run's material may be read.
        output: Where everything is written, and residuals and training states are looked for.
    """

    program: Path | None
    models: NamedFolders
    data: NamedFolders
    output: Path


class Shown(Protocol):
    """Shows what a run is doing; as ``RunProgress`` of the hosts."""

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``phase`` are finished; may raise to interrupt."""
        ...

    def say(self, text: str) -> None:
        """Show a sentence that stays."""
        ...


class ReadyRun(Protocol):
    """A run that can start: everything is loaded and checked, nothing is written.

    Every method may raise BlockSkipError.
    """

    @property
    def agreed(self) -> Mapping[str, object]:
        """Everything that all processes of a run must have in common, by name; JSON."""
        ...

    def train(self) -> None:
        """Compute what is missing, train, and, in process 0, write the LoRA and say where it is."""
        ...


class RunHost(Protocol):
    """A host. Both functions may raise BlockSkipError."""

    def start(self, places: Places, arguments: Sequence[str]) -> None:
        """Make the host's program importable, with arguments of its own; called once, before anything else."""
        ...

    def prepare(self, run: RunFile, places: Places, progress: Shown, together: Together) -> ReadyRun:
        """Load the model and everything else that the run names, and check it.

        Args:
            run: The run file; its ``model`` and ``settings`` may be anything.
            places: The folders that may be used.
            progress: Shows the run.
            together: The processes that share it. Only process 0 may write the run's files.
        """
        ...


def host_named(name: str) -> RunHost:
    """Return a host by its name in run files.

    Raises:
        InvalidInputError: If there is none of that name.
    """
    if name not in HOSTS:
        raise InvalidInputError(f"The run file is for the host {name!r}, and this version knows {', '.join(HOSTS)}.")
    return importlib.import_module(f"..{HOSTS[name]}", __package__)

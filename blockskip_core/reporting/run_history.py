"""The latest runs of this session, kept in memory for pages that are opened during or after a run."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .loss_curve import LossCurve, LossPoint, finite, smoothing_span

MAX_RUNS = 8
MAX_POINTS_AT_ONCE = 200


class RunRecord:
    """One run of one node: its curve and its latest figures. Safe to read while another thread writes.

    Args:
        node: The node's id in the prompt.
        workflow: The id of its workflow, or None if the prompt does not specify it.

    Attributes:
        summary: The summary's file, once it is written. It is not part of what is sent.
    """

    def __init__(self, node: str, workflow: str | None) -> None:
        self.run = uuid.uuid4().hex
        self.node, self.workflow = node, workflow
        self.started = time.time()
        self.summary: Path | None = None
        self._lock = threading.Lock()
        self._curve: LossCurve | None = None
        self._figures: dict[str, Any] = {"status": "running", "phase": "starting", "detail": ""}
        self._unsent: list[LossPoint] = []
        self._samples: list[dict[str, Any]] = []
        self._samples_sent = 0
        self._wants_sample = False

    def note(self, **figures: Any) -> None:
        """Record the latest figures; numbers that are not finite become None."""
        with self._lock:
            self._figures.update({name: _plain(value) for name, value in figures.items()})

    def add_earlier(self, losses: Sequence[float], steps: int) -> None:
        """Record the steps made by an interrupted run, before the first of this run's ``steps``."""
        with self._lock:
            curve = self._curve_for(steps)
            for step, loss in enumerate(losses, 1):
                curve.add(step, loss)
            self._figures.update(step=len(losses), steps=steps)

    def add_step(self, step: int, steps: int, loss: float, learning_rate: float) -> None:
        """Record a finished step of ``steps``."""
        with self._lock:
            self._unsent.append(self._curve_for(steps).add(step, loss, learning_rate))
            self._figures.update(step=step, steps=steps)

    def add_sample(self, step: int, prompt: int, file: str, subfolder: str, likeness: float | None = None) -> None:
        """Record a picture sampled after ``step`` steps: the number of its prompt, its file, its likeness if known."""
        sample = {"step": step, "prompt": prompt, "file": file, "subfolder": subfolder, "likeness": finite(likeness)}
        with self._lock:
            self._samples.append(sample)

    def ask_for_sample(self) -> bool:
        """Ask the run to sample at its next step; return False if it samples nothing, or no longer."""
        with self._lock:
            possible = self._figures["status"] == "running" and self._figures.get("can_sample") is True
            if possible:
                self._wants_sample = True
            return possible

    @property
    def wants_sample(self) -> bool:
        """Whether someone has asked for a sample that is not made yet."""
        return self._wants_sample

    def sample_made(self) -> None:
        """Forget what was asked for."""
        with self._lock:
            self._wants_sample = False

    def news(self) -> dict[str, Any]:
        """Return the figures and the points since the last call; ``first`` is the number of points before them.

        After a long gap only the newest points are returned, which shows in ``first``. The samples, all of them, are
        only there if there are new ones.
        """
        with self._lock:
            points, self._unsent = self._unsent[-MAX_POINTS_AT_ONCE:], []
            more = {"samples": list(self._samples)} if len(self._samples) > self._samples_sent else {}
            self._samples_sent = len(self._samples)
            return {**self._head(), **more, "first": self._count() - len(points), "points": points}

    def snapshot(self, max_points: int | None = None) -> dict[str, Any]:
        """Return everything, with the curve thinned; ``count`` is the number of points before thinning."""
        with self._lock:
            points = self._curve.points(max_points) if self._curve else []
            return {**self._head(), "samples": list(self._samples), "count": self._count(), "points": points}

    def _curve_for(self, steps: int) -> LossCurve:
        self._curve = self._curve or LossCurve(smoothing_span(steps))
        return self._curve

    def _count(self) -> int:
        return self._curve.count if self._curve else 0

    def _head(self) -> dict[str, Any]:
        ids = {"run": self.run, "node": self.node, "workflow": self.workflow, "started": self.started}
        return {**ids, **self._figures, "wants_sample": self._wants_sample}


class RunHistory:
    """The last run of each node; of more than ``limit`` runs the oldest are dropped."""

    def __init__(self, limit: int = MAX_RUNS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._runs: OrderedDict[tuple[str | None, str], RunRecord] = OrderedDict()

    def begin(self, node: str, workflow: str | None) -> RunRecord:
        """Return a new run, which replaces the node's last one."""
        record = RunRecord(node, workflow)
        with self._lock:
            self._runs.pop((workflow, node), None)
            self._runs[workflow, node] = record
            while len(self._runs) > self._limit:
                self._runs.popitem(last=False)
        return record

    def last(self, node: str, workflow: str | None) -> RunRecord | None:
        """Return the node's last run in that workflow or in a prompt without a workflow, whichever is newer."""
        with self._lock:
            found = [self._runs.get((workflow, node)), self._runs.get((None, node))]
        return max((run for run in found if run), key=lambda run: run.started, default=None)

    def run(self, run: str) -> RunRecord | None:
        """Return the run with an id, if it is still kept."""
        with self._lock:
            return next((record for record in self._runs.values() if record.run == run), None)


def _plain(value: Any) -> Any:
    return finite(value) if isinstance(value, float) else value
